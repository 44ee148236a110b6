"""Composition: every option, the plain path against Hydra, types, and what a run file looks like."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
import time
from typing import Any

import pytest
import yaml

from lab.config import CONFIG_DIR, ConfigError, compose_config, load, run_config_from_json, to_json
from lab.config.compose import compose_hydra
from lab.config.known import groups, options, settings
from lab.config.plain import NotPlain, compose_plain
from lab.vocab import AttentionBackend, Checkpointing, Precision, Strategy

ALL_OPTIONS = [(group, option) for group in groups() for option in options(group)]
EXPERIMENTS = options("experiment")


def overrides_for(group: str, option: str) -> list[str]:
    """What an option needs beside itself to be a valid run on any machine."""
    needs = {
        ("parallel", "hsdp"): ["world_size=2"],
        ("data", "hf"): ["data.path=some/corpus"],
        ("model", "hf"): ["model.path=configs/hf/gpt2.json", "model.random_weights=true"],
        ("data", "text"): [f"data.path={CONFIG_DIR}/*.yaml"],
        ("precision", "fp16_mixed"): ["hardware=h200"],
        ("attention", "mem_efficient"): ["hardware=h200"],
        ("attention", "cudnn"): ["hardware=h200"],
        ("measure", "snapshot"): ["hardware=h200"],
    }.get((group, option), ["adapter=lora"] if group == "quantization" and option != "none" else [])
    return [f"{group}={option}", *needs, *([] if group == "hardware" or "hardware=h200" in needs else ["hardware=cpu"])]


@pytest.mark.parametrize(("group", "option"), [pair for pair in ALL_OPTIONS if pair[0] != "experiment"])
def test_every_option_composes_and_resolves(group: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.config.rules.find_spec", lambda name: name)  # data=hf's library is an extra
    cfg = load(overrides_for(group, option))
    assert cfg.choices[group] == option
    assert run_config_from_json(json.loads(json.dumps(to_json(cfg)))) == cfg


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("parallel", Strategy),
        ("precision", Precision),
        ("checkpointing", Checkpointing),
        ("attention", AttentionBackend),
    ],
)
def test_options_are_the_vocabulary(group: str, names: Any) -> None:
    assert options(group) == sorted(m.value for m in names)


def test_every_setting_exists_in_some_option() -> None:
    """A field of the schema that no YAML file has could not be set on the command line."""
    trees = [compose_config(overrides_for(*pair)) for pair in ALL_OPTIONS if pair[0] != "experiment"]
    for key, kind in settings().items():
        if not dataclasses.is_dataclass(kind):
            group, *path = key.split(".")

            def holds(tree: Any, path: list[str]) -> bool:
                return not path or (isinstance(tree, dict) and path[0] in tree and holds(tree[path[0]], path[1:]))

            assert any(holds(tree, [group, *path]) for tree in trees), key


def test_no_setting_of_a_yaml_file_is_unknown() -> None:
    known = settings()
    for group, option in ALL_OPTIONS:
        if group == "experiment":
            continue
        tree = yaml.safe_load((CONFIG_DIR / group / f"{option}.yaml").read_text())
        assert set(tree) - {"defaults"} <= {k.split(".")[1] for k in known if k.startswith(f"{group}.")}, (
            group,
            option,
        )


SCALARS = {
    "train.steps": ["7", "+7", "1_000", "1e3", "0", "-3"],
    "optimizer.lr": ["1e-3", "3E-4", "0.1", ".5", "1.", "0", "-2.5e+1", "10"],
    "train.max_grad_norm": ["null", "Null", "1.0"],
    "train.compile": ["true", "False", "TRUE"],
    "name": ["abc", "a-b_c.d", "true", "x1_000", "a.1", "/tmp/0123", "None", "e5", "_x", "a-5.5e3", "nullx"],
    "data.cache_dir": ["/tmp/cache", "outputs/.cache", "a/b-c/d.1"],
    "seed": ["0", "42"],
    "world_size": ["null", "2"],
    "model.bias": ["true"],
    "model.num_kv_heads": ["null", "2"],
    "launch.timeout_s": ["10", "0.5"],
    "tracker.project": ["some-project", "p"],
}


def both(overrides: list[str]) -> None:
    """The plain composition takes ``overrides`` and agrees with Hydra, types included."""
    plain, hydra = compose_plain(overrides), compose_hydra(overrides)
    assert plain == hydra
    assert repr_types(plain[0]) == repr_types(hydra[0])


def repr_types(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: repr_types(v) for k, v in tree.items()}
    return [repr_types(v) for v in tree] if isinstance(tree, list) else type(tree)


@pytest.mark.parametrize(("group", "option"), ALL_OPTIONS)
def test_plain_composition_equals_hydra_for_every_option(group: str, option: str) -> None:
    both([f"{group}={option}"])


def test_plain_composition_equals_hydra_for_every_kind_of_scalar() -> None:
    width = max(map(len, SCALARS.values()))
    for column in range(width):  # one value of every setting at once: as many compositions as the longest row
        both([f"{key}={values[column % len(values)]}" for key, values in SCALARS.items()])


def test_plain_composition_equals_hydra_for_random_mixtures() -> None:
    draw = random.Random(0)
    for _ in range(25):
        overrides = [f"{g}={draw.choice(options(g))}" for g in groups() if draw.random() < 0.4 and options(g)]
        overrides += [f"{key}={draw.choice(v)}" for key, v in SCALARS.items() if draw.random() < 0.4]
        study = any(o.startswith("experiment=") for o in overrides)  # which may choose these options itself
        if "tracker=none" in overrides or study:
            overrides = [o for o in overrides if not o.startswith("tracker.")]
        if "model=hf" in overrides or study:  # whose shapes are no settings
            overrides = [o for o in overrides if not o.startswith("model.")]
        draw.shuffle(overrides)
        both(overrides)


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=1,2", "train.steps=", "+train.steps=3", "~train", "train={steps: 3}", "measure.ledger_steps=[1]",
        'name="a b"', "name='a'", "name=${seed}", "name=a b", "train.stepz=3", "model=nothing", "model=../run",
        "optimizer.lr=inf", "optimizer.lr=nan", "train=3", "train.steps.x=3", "hydra.run.dir=x", "model=null",
        "parallel.zero.reduce_bucket_size=5", "measure.ledger_steps=3", "seed=1__0", "seed=007", "name=a:b",
    ],
)  # fmt: skip
def test_anything_else_is_left_to_hydra(override: str) -> None:
    with pytest.raises(NotPlain):
        compose_plain([override])


def test_hydra_grammar_beyond_the_plain_cases_works() -> None:
    cfg = load(["hardware=cpu", "measure.ledger_steps=[0, 1,-1]", "train={steps: 9, seq_len: 64}", 'name="a.b"'])
    assert cfg.measure.ledger_steps == (0, 1, -1)
    assert (cfg.train.steps, cfg.train.seq_len, cfg.train.micro_batch_size) == (9, 64, 1)
    assert cfg.name == "a.b"
    assert load(["hardware=cpu", "optimizer.betas=[0.5,0.9]"]).optimizer.betas == (0.5, 0.9)
    assert load(["hardware=cpu", "seed=3", "name=run${seed}"]).name == "run3"
    assert load(["hardware=cpu", "seed=3", "seed=3"]).seed == 3, "a repetition contradicts nothing"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_its_points_are_listed(name: str) -> None:
    tree = compose_config([f"experiment={name}"])
    assert tree["choices"]["experiment"] == name
    assert tree["name"] == name, "its folder under outputs/"
    lines = tree["sweep"]
    assert lines
    assert all(isinstance(line, (str, list)) for line in lines)
    for line in lines:
        words = line.split() if isinstance(line, str) else line
        first_values = [re.sub(r",[^\]]*$", "", word) for word in words]
        refused = setting_refused([f"experiment={name}", "hardware=h200", *first_values])
        if (name, refused) != ("h200_blind7", "attention"):  # drawn before the rules that refuse it now
            assert refused is None, line


def setting_refused(overrides: list[str]) -> str | None:
    try:
        load(overrides)
    except ConfigError as error:
        return error.setting
    return None


def test_derived_shapes_and_types() -> None:
    cfg = load(["hardware=cpu", "model=3b", "parallel=zero3", "parallel.zero.reduce_bucket_size=5e8", "world_size=4"])
    assert (cfg.model.head_dim, cfg.model.num_kv_heads) == (128, 8)
    assert load(["hardware=cpu"]).model.num_kv_heads == 4
    assert type(cfg.parallel.zero.reduce_bucket_size) is int
    assert type(cfg.optimizer.lr) is float
    assert cfg.parallel.strategy is Strategy.ZERO3
    assert cfg.overrides[0] == "hardware=cpu"
    assert cfg.dp_degree == 4


def test_world_size_comes_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert load(["hardware=cpu", "parallel=ddp"]).world_size == 4
    assert load(["hardware=cpu", "parallel=ddp", "world_size=4"]).world_size == 4
    with pytest.raises(ConfigError, match=r"world_size=2: torchrun started 4"):
        load(["hardware=cpu", "parallel=ddp", "world_size=2"])


@pytest.mark.parametrize("strategy", [s.value for s in Strategy if s not in (Strategy.SINGLE, Strategy.HSDP)])
def test_one_process_may_run_any_sharded_strategy(strategy: str) -> None:
    assert load(["hardware=cpu", f"parallel={strategy}"]).world_size == 1


def test_automatic_hardware_follows_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, row in [([], "cpu"), (["NVIDIA H200"], "h200"), (["Some Other GPU"], "unknown_gpu")]:
        monkeypatch.setattr("lab.config.device._nvml_names", lambda names=names: names)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        hardware = load([]).hardware
        assert hardware.name == row
        assert hardware.gpu_name == (names[0] if names else "")
    monkeypatch.setattr("lab.config.device._nvml_names", lambda: ["Some Other GPU", "NVIDIA H200"])
    for visible, row in [("1", "h200"), ("0,1", "unknown_gpu"), ("", "cpu"), ("-1", "cpu")]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert load([]).hardware.name == row


def test_errors_survive_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ConfigError("train.steps", True, "a number")))
    assert str(error) == "train.steps=true: a number"


def test_loading_stays_quick_and_light() -> None:
    """Composing and checking a plain configuration needs neither Hydra nor torch nor a GPU library."""
    code = (
        "import sys; from lab.config import load; load(['hardware=h200', 'model=7b', 'train.seq_len=64']);"
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'pynvml', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
    assert out.stderr == ""
    load(["hardware=h200"])
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        load(["hardware=h200", "model=7b"])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1


def test_pairs_of_strategy_precision_and_checkpointing_are_valid() -> None:
    for strategy, precision, checkpointing in itertools.product(Strategy, Precision, Checkpointing):
        world = 1 if strategy is Strategy.SINGLE else 2
        choices = [f"parallel={strategy}", f"precision={precision}", f"checkpointing={checkpointing}"]
        load([*choices, f"world_size={world}", "hardware=h200"])
