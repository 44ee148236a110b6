"""Bad input: one line that names the setting, its value and what would be right, and nothing is touched.

All cases run in one subprocess, which shows as well that no torch, no GPU library and no folder is needed to refuse.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# (overrides, setting named, value named, what would be right). `hardware=cpu` is put in front unless one is given.
CASES: list[tuple[list[str], str, str, str]] = [
    # not an override at all
    (["model"], "model", "", "expected KEY=VALUE"),
    (["--steps"], "--steps", "", "expected KEY=VALUE"),
    ([""], "''", "", "expected KEY=VALUE"),
    (["=5"], "=5", "", "expected KEY=VALUE"),
    (["train.steps=[1,2"], "train.steps", "[1,2", "quote text"),
    (['name="a'], "name", '"a', "quote text"),
    (["name={"], "name", "{", "quote text"),
    (["name=a=b"], "name", "a=b", "quote text"),
    (["name=a\nb"], "name", "a b", "quote text"),
    (["train.steps=" + "9" * 5000], "train.steps", "99999", "longer than 4000 characters"),
    # several values, none, or twice
    (["train.steps=1,2"], "train.steps", "1,2", "use `lab sweep`"),
    (["train.steps=range(1,3)"], "train.steps", "range(1,3)", "use `lab sweep`"),
    (["parallel=ddp,zero3"], "parallel", "ddp,zero3", "use `lab sweep`"),
    (["model=choice(tiny,25m)"], "model", "choice(tiny,25m)", "use `lab sweep`"),
    (["train.steps="], "train.steps", "", "a whole number"),
    (["tracker.project="], "tracker.project", "", "text"),
    (["train.max_grad_norm="], "train.max_grad_norm", "", "a number or null"),
    (["model="], "model", "", "one of 125m, 1b"),
    (["train.steps=3", "train.steps=4"], "train.steps", "4", "given twice, also as train.steps=3"),
    (["model=25m", "model=tiny"], "model", "tiny", "given twice, also as model=25m"),
    # settings and options that do not exist
    (["train.stepz=3"], "train.stepz", "3", "did you mean train.steps?"),
    (["steps=3"], "steps", "3", "did you mean train.steps?"),
    (["micro_batch_size=4"], "micro_batch_size", "4", "did you mean train.micro_batch_size?"),
    (["hidden_size=64"], "hidden_size", "64", "did you mean model.hidden_size?"),
    (["lr=1e-3"], "lr", "1e-3", "did you mean optimizer.lr?"),
    (["paralel=ddp"], "paralel", "ddp", "did you mean parallel?"),
    (["parallel.zero.reduce_bucket=1"], "parallel.zero.reduce_bucket", "1", "parallel.zero.reduce_bucket_size?"),
    (["train.steps.a=3"], "train.steps.a", "3", "did you mean train.steps?"),
    (["hydra.run.dir=x"], "hydra.run.dir", "x", "no such setting"),
    (["hydra/launcher=x"], "hydra/launcher", "x", "no such setting"),
    (["model@other=tiny"], "model@other", "tiny", "no such setting"),
    (["choices.model=tiny"], "choices.model", "tiny", "no such setting"),
    (["train={stepz: 3}"], "train", "{stepz: 3}", "did you mean train.steps?"),
    (["parallel={zero: {reduce_scatter: true}}"], "parallel", "{zero:", "not a setting of the chosen option"),
    (["model=nothing"], "model", "nothing", "one of 125m, 1b, 25m, 350m, 3b, 7b, hf, tiny"),
    (["model=../run"], "model", "../run", "one of 125m"),
    (["parallel=zero"], "parallel", "zero", "zero1, zero2, zero3"),
    (["parallel=dpp"], "parallel", "dpp", "did you mean ddp?"),
    (["parallel=null"], "parallel", "null", "one of ddp, fsdp"),
    (["parallel=[ddp,fsdp]"], "parallel", "[ddp,fsdp]", "one of ddp, fsdp"),
    (["precision=bf16"], "precision", "bf16", "one of bf16_mixed, bf16_pure, fp16_mixed, fp32"),
    (["hardware=a100"], "hardware", "a100", "one of auto, cpu, h200"),
    (["engine=deepspeed"], "engine", "deepspeed", "one of accelerate"),
    (["engine=accelerate", "parallel=fsdp"], "engine", "accelerate", "ignores its FSDP plugin on a CPU"),
    (["engine=accelerate", "train.compile=true"], "engine", "accelerate", "engine=native only"),
    (["engine=accelerate", "hardware=h200", "parallel=fsdp", "parallel.fsdp.reduce_dtype=fp32"],
     "parallel.fsdp.reduce_dtype", "fp32", "reduces in the compute dtype"),
    (["adapter=lora", "quantization=nf4", "model.tied_head=true", "quantization.skip_modules=[o_proj]"],
     "quantization.skip_modules", "[o_proj]", "tied head is the embedding's weight"),
    (["engine=accelerate", "hardware=h200", "parallel=fsdp", "adapter=lora", "quantization=nf4_double"],
     "engine", "accelerate", "quantization=nf4_double with FSDP is trained by engine=native only"),
    (["engine.accelerate_config=x"], "engine.accelerate_config", "x", "it belongs to engine=accelerate"),
    (["engine=accelerate", "engine.accelerate_config=no/such.yaml"], "engine.accelerate_config", "no/such.yaml",
     "cannot be read"),
    (["experiment=nothing"], "experiment", "nothing", "no such option; one of"),
    # adding and removing
    (["+new.key=1"], "+new.key", "1", "no such setting"),
    (["+train.step=1"], "+train.step", "1", "did you mean train.steps?"),
    (["+train.steps=3"], "+train.steps", "3", "write train.steps=3, without '+'"),
    (["++train.steps=3"], "++train.steps", "3", "write train.steps=3, without '+'"),
    (["+model=25m"], "+model", "25m", "write model=25m, without '+'"),
    (["~train"], "~train", "", "cannot be removed"),
    (["~train.steps=5"], "~train.steps", "5", "cannot be removed"),
    # settings of another option
    (["parallel.zero.reduce_bucket_size=5e8"], "parallel.zero.reduce_bucket_size", "5e8",
     "not a setting of parallel=single; it belongs to parallel=zero1, zero2, zero3"),
    (["parallel=zero3", "parallel.ddp.bucket_cap_mb=3"], "parallel.ddp.bucket_cap_mb", "3", "belongs to parallel=ddp"),
    (["optimizer.momentum=0.5"], "optimizer.momentum", "0.5", "it belongs to optimizer=sgd"),
    (["optimizer=sgd", "optimizer.betas=[0.9,0.95]"], "optimizer.betas", "[0.9,0.95]", "belongs to optimizer=adamw"),
    (["checkpointing.every_k=2"], "checkpointing.every_k", "2", "belongs to checkpointing=every_k"),
    (["loss.num_chunks=3"], "loss.num_chunks", "3", "belongs to loss=chunked"),
    (["tracker=none", "tracker.mode=offline"], "tracker.mode", "offline", "belongs to tracker=wandb"),
    (["data.path=x"], "data.path", "x", "belongs to data=hf, text"),
    (["parallel.strategy=zero3"], "parallel.strategy", "zero3", "write parallel=zero3"),
    (["precision.kind=fp32"], "precision.kind", "fp32", "write precision=fp32"),
    # types
    (["train.steps=1.5"], "train.steps", "1.5", "a whole number"),
    (["train.steps=abc"], "train.steps", "abc", "a whole number"),
    (["train.steps=true"], "train.steps", "true", "a whole number"),
    (["train.steps=null"], "train.steps", "null", "a whole number"),
    (["train.steps=[1]"], "train.steps", "[1]", "a whole number"),
    (["train.steps={a: 1}"], "train.steps", "{a: 1}", "a whole number"),
    (['train.steps="5"'], "train.steps", '"5"', "a whole number"),
    (["train=5"], "train", "5", "such as train.micro_batch_size"),
    (["parallel.zero=1"], "parallel.zero", "1", "such as parallel.zero.reduce_bucket_size"),
    (["train.compile=maybe"], "train.compile", "maybe", "true or false"),
    (["train.max_grad_norm=much"], "train.max_grad_norm", "much", "a number or null"),
    (["optimizer.lr=fast"], "optimizer.lr", "fast", "a number"),
    (["optimizer.betas=0.9"], "optimizer.betas", "0.9", "a list of 2 numbers"),
    (["optimizer.betas=[0.9]"], "optimizer.betas", "[0.9]", "a list of 2 numbers"),
    (["optimizer.betas=[a,b]"], "optimizer.betas", "[a,b]", "a list of 2 numbers"),
    (["measure.ledger_steps=3"], "measure.ledger_steps", "3", "a list of whole numbers"),
    (["name=${nothing}"], "name", "${nothing}", "'nothing' not found"),
    (["name=???"], "name", "???", "mandatory value"),
    # out of range
    (["train.steps=inf"], "train.steps", "inf", "a whole number"),
    (["optimizer.lr=nan"], "optimizer.lr", "nan", "a finite number"),
    (["optimizer.lr=inf"], "optimizer.lr", "inf", "a finite number"),
    (["launch.timeout_s=-inf"], "launch.timeout_s", "-inf", "a finite number"),
    (["train.steps=0"], "train.steps", "0", "positive"),
    (["train.steps=-1"], "train.steps", "-1", "positive"),
    (["train.micro_batch_size=0"], "train.micro_batch_size", "0", "positive"),
    (["train.gradient_accumulation_steps=0"], "train.gradient_accumulation_steps", "0", "positive"),
    (["train.max_grad_norm=0"], "train.max_grad_norm", "0", "null for no clipping"),
    (["train.warmup_steps=10"], "train.warmup_steps", "10", "at most train.steps=5"),
    (["optimizer.lr=-1"], "optimizer.lr", "-1", "not be negative"),
    (["optimizer.betas=[0.9,1.0]"], "optimizer.betas", "[0.9,1.0]", "less than 1"),
    (["model.hidden_size=1e12"], "model.hidden_size", "1e12", "at most 2147483647"),
    (["model.vocab_size=2147483648"], "model.vocab_size", "2147483648", "at most 2147483647"),
    (["world_size=99999999999"], "world_size", "99999999999", "at most 2147483647"),
    (["seed=-1"], "seed", "-1", "not be negative"),
    (["seed=99999999999999999999"], "seed", "99999999999999999999", "at most 2^63 - 1"),
    (["launch.timeout_s=0"], "launch.timeout_s", "0", "positive"),
    (["checkpointing=every_k", "checkpointing.every_k=0"], "checkpointing.every_k", "0", "positive"),
    (["checkpointing=every_k", "checkpointing.every_k=9"], "checkpointing.every_k", "9", "at most model.num_layers=4"),
    (["loss=chunked", "loss.num_chunks=0"], "loss.num_chunks", "0", "positive"),
    (["loss=chunked", "loss.num_chunks=257"], "loss.num_chunks", "257", "at most the 256 tokens"),
    (["parallel=zero2", "parallel.zero.reduce_bucket_size=0"], "parallel.zero.reduce_bucket_size", "0", "positive"),
    (["parallel=fsdp", "parallel.fsdp.reduce_dtype=fp64"], "parallel.fsdp.reduce_dtype", "fp64", "one of fp32, param"),
    (["name=a/b"], "name", "a/b", "it names a folder"),
    (["name=.."], "name", "..", "it names a folder"),
    (["name=" + "x" * 300], "name", "xxx", "up to 200"),
    (["model.norm=batch"], "model.norm", "batch", "one of rmsnorm, layernorm"),
    (["tracker.mode=never"], "tracker.mode", "never", "one of auto, offline, online"),
    # shapes
    (["model.num_heads=3"], "model.num_heads", "3", "must divide model.hidden_size=128"),
    (["model.num_heads=0"], "model.num_heads", "0", "positive"),
    (["model.num_kv_heads=3"], "model.num_kv_heads", "3", "must divide model.num_heads=4"),
    (["model.num_kv_heads=8"], "model.num_kv_heads", "8", "must divide model.num_heads=4"),
    (["model.head_dim=33"], "model.head_dim", "33", "even with model.position=rope"),
    (["model.dropout=1.5"], "model.dropout", "1.5", "less than 1"),
    (["train.seq_len=100000"], "train.seq_len", "100000", "at most model.max_seq_len=2048"),
    # contradictions
    (["world_size=4"], "world_size", "4", "parallel=single is one process"),
    (["world_size=two"], "world_size", "two", "a whole number"),
    (["world_size=0"], "world_size", "0", "positive"),
    (["parallel=hsdp", "world_size=3"], "world_size", "3", "an even number of ranks"),
    (["parallel=hsdp", "world_size=4", "parallel.fsdp.shard_size=3"], "parallel.fsdp.shard_size", "3",
     "must divide world_size=4"),
    (["parallel=fsdp", "parallel.fsdp.shard_size=2"], "parallel.fsdp.shard_size", "2", "only with parallel=hsdp"),
    (["precision=fp16_mixed"], "precision", "fp16_mixed", "needs a GPU"),
    (["attention=cudnn"], "attention", "cudnn", "needs a GPU"),
    (["attention=flash", "model.dropout=0.1"], "attention", "flash", "attention=math or eager"),
    (["hardware=h200", "attention=flash", "precision=fp32"], "attention", "flash", "needs bf16 or fp16"),
    (["hardware=h200", "attention=flash", "model.head_dim=264"], "attention", "flash", "up to 256"),
    (["hardware=h200", "attention=cudnn", "model.head_dim=36"], "attention", "cudnn", "a multiple of 8"),
    (["hardware=h200", "attention=mem_efficient", "model.head_dim=36"], "attention", "mem_efficient",
     "a multiple of 8"),
    (["hardware=h200", "attention=mem_efficient", "model.head_dim=50", "precision=fp32"], "attention", "mem_efficient",
     "a multiple of 4"),
    (["hardware=h200", "attention=flash", "precision=bf16_pure", "adapter=lora", "quantization=nf4"], "attention",
     "flash", "adapter.prepare_kbit=false"),
    (["measure=snapshot"], "measure", "snapshot", "on a CPU use measure=ledger"),
    (["measure.ledger_steps=[7]"], "measure.ledger_steps", "[7]", "steps from -5 to 4"),
    (["measure=ledger", "train.compile=true"], "train.compile", "true", "use measure=counters or measure=off"),
    (["parallel=zero1", "train.compile=true"], "train.compile", "true", "not offered with parallel=zero1"),
    # data
    (["data=text"], "data.path", "null", "a glob of text files"),
    (["data=text", "data.path=missing/*.txt"], "data.path", "missing/*.txt", "matches no file"),
    (["data=hf"], "data.path", "null", "a dataset id or folder"),
    (["data.tokenizer_vocab_size=10"], "data.tokenizer_vocab_size", "10", "at least 257"),
    (["data.tokenizer_vocab_size=4096"], "data.tokenizer_vocab_size", "4096", "at most model.vocab_size=2048"),
    (["data.max_bytes=0"], "data.max_bytes", "0", "positive"),
]  # fmt: skip

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("error")
from lab.config import ConfigError, load
messages = []
for overrides in json.load(sys.stdin):
    try:
        load(overrides)
        messages.append(None)
    except ConfigError as error:
        messages.append(str(error))
heavy = [m for m in ("torch", "deepspeed", "numpy", "pynvml", "wandb", "tokenizers") if m in sys.modules]
json.dump({"messages": messages, "heavy": heavy}, sys.stdout)
"""


def full(overrides: list[str]) -> list[str]:
    return overrides if any(o.startswith("hardware=") for o in overrides) else ["hardware=cpu", *overrides]


@pytest.fixture(scope="module")
def refusal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process says to all cases, run in an empty folder that must stay empty."""
    folder = tmp_path_factory.mktemp("refusal")
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([full(overrides) for overrides, *_ in CASES]),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, "PYTHONPATH": str(root)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr, "left": [p.name for p in folder.iterdir()]}


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 75
    assert len({json.dumps(overrides) for overrides, *_ in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("index", "setting", "value", "right"),
    [(i, *case[1:]) for i, case in enumerate(CASES)],
    ids=[" ".join(case[0])[:60] or "(empty)" for case in CASES],
)
def test_one_line_names_setting_value_and_what_is_right(
    refusal: dict[str, Any], index: int, setting: str, value: str, right: str
) -> None:
    message = refusal["messages"][index]
    assert message is not None, "accepted"
    assert "\n" not in message
    assert len(message) < 400
    assert message.startswith(f"{setting}={value}" if value else setting)
    assert right in message


def test_refusing_touches_nothing(refusal: dict[str, Any]) -> None:
    assert refusal["heavy"] == []
    assert refusal["left"] == []
    assert refusal["stderr"] == ""


@pytest.mark.parametrize("launched", ["abc", "0", "-1", "1.5"])
def test_a_broken_environment_is_named(launched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lab.config import ConfigError, load

    monkeypatch.setenv("WORLD_SIZE", launched)
    with pytest.raises(ConfigError, match=f"^WORLD_SIZE={launched}: set by torchrun"):
        load(["hardware=cpu"])


def test_an_extra_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from lab.config import ConfigError, load

    monkeypatch.setattr("lab.config.rules.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'^data=hf: .*pip install -e "\.\[hf\]"'):
        load(["hardware=cpu", "data=hf", "data.path=some/corpus"])


def test_a_broken_yaml_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study with a typing error, an unknown setting or an unknown option in its file."""
    import shutil

    import lab.config.compose
    import lab.config.known
    import lab.config.plain
    from lab.config import CONFIG_DIR, ConfigError, load

    shutil.copytree(CONFIG_DIR, tmp_path / "configs")
    for module in (lab.config.compose, lab.config.known, lab.config.plain):
        monkeypatch.setattr(module, "CONFIG_DIR", tmp_path / "configs")
    (tmp_path / "configs" / "experiment").mkdir(exist_ok=True)
    study = tmp_path / "configs" / "experiment" / "mine.yaml"
    for text, part in [
        ("train: {steps: 3\n", "mine"),
        ("# @package _global_\ntrain:\n  stepz: 3\n", "train.stepz=3: no such setting; did you mean train.steps?"),
        ("# @package _global_\ntrian:\n  steps: 3\n", "no such setting; did you mean train?"),
        ("# @package _global_\ndefaults:\n  - override /model: huge\n", "model=huge: no such option; one of 125m"),
        ("# @package _global_\ntrain:\n  steps: many\n", "train.steps=many: expected a whole number"),
        ("# @package _global_\nname: ${nowhere}\n", "nowhere"),
    ]:
        study.write_text(text)
        with pytest.raises(ConfigError) as error:
            load(["hardware=cpu", "experiment=mine"])
        assert "\n" not in str(error.value)
        assert part in str(error.value)
