"""Published formulas reproduce their sources' printed tables; `lab validate --formula` holds them against records."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.analytic import predict
from lab.analytic.architecture import num_parameters
from lab.analytic.published import FORMULAS
from lab.analytic.published.deepspeed import largest_layer_parameters, zero2_bytes, zero3_bytes
from lab.analytic.published.eleutherai import eleutherai
from lab.analytic.published.huggingface import anatomy_bytes, blog_bytes
from lab.analytic.published.korthikanti import activation_bytes, ends_activation_bytes, layer_activation_bytes
from lab.analytic.published.zero import model_state_bytes, rule16
from lab.cli.formulas import chosen, evaluate, formulas_json, formulas_text
from lab.cli.main import main
from lab.config import ConfigError, load
from lab.track.bundle import read_records
from lab.units import GIB

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
GB = 1e9

# Table 1 as printed: psi in 1e9, N, GB per device in stages 1, 2 and 3. Some of its cells are cut, not rounded.
TABLE_1 = [
    (7.5, 1, "120", "120", "120"),
    (7.5, 4, "52.5", "41.3", "30"),
    (7.5, 16, "35.6", "21.6", "7.5"),
    (7.5, 64, "31.4", "16.6", "1.88"),
    (7.5, 256, "30.4", "15.4", "0.47"),
    (7.5, 1024, "30.1", "15.1", "0.12"),
    (128, 1, "2048", "2048", "2048"),
    (128, 4, "896", "704", "512"),
    (128, 16, "608", "368", "128"),
    (128, 64, "536", "284", "32"),
    (128, 256, "518", "263", "8"),
    (128, 1024, "513", "257", "2"),
    (1000, 1, "16000", "16000", "16000"),
    (1000, 4, "7000", "5500", "4000"),
    (1000, 16, "4750", "2875", "1000"),
    (1000, 64, "4187", "2218", "250"),
    (1000, 256, "4046", "2054", "62.5"),
    (1000, 1024, "4011", "2013", "15.6"),
]


@pytest.mark.parametrize(("psi", "ranks", "one", "two", "three"), TABLE_1)
def test_zero_table_1(psi: float, ranks: int, one: str, two: str, three: str) -> None:
    for stage, printed in enumerate((one, two, three), start=1):
        value = model_state_bytes(int(psi * GB), ranks, stage) / GB
        digits = len(printed.partition(".")[2])
        rounded = math.floor(value * 10**digits + 0.5) / 10**digits
        cut = math.floor(value * 10**digits) / 10**digits
        assert float(printed) in (rounded, cut), (stage, value)


def test_rule_of_16() -> None:
    """7 B parameters: 14 GB of weights, 112 GB of states."""
    assert model_state_bytes(7_000_000_000, 1, 0) == 112 * GB
    single = load(["model=7b", "hardware=h200"])
    sharded = load(["model=7b", "hardware=h200", "parallel=fsdp", "world_size=4"])
    assert rule16(single) == 16 * 6_738_415_616
    assert rule16(sharded) == 4 * 6_738_415_616
    assert rule16(load(["model=7b", "hardware=h200", "parallel=zero2", "world_size=4"])) is None


# Korthikanti's models: layers, hidden, heads; sequence 2048, vocabulary 51200, tensor parallel 8.
MODELS = [("22", 48, 6144, 64), ("175", 96, 12288, 96), ("530", 105, 20480, 128), ("1008", 128, 25600, 160)]


@pytest.mark.parametrize(("billions", "layers", "h", "a"), MODELS)
def test_korthikanti_models(billions: str, layers: int, h: int, a: int) -> None:
    """Sizes as named (1T: 1008), each way to save against by-hand coefficients of sbh, and the abstract's factor 5."""
    shape = [f"model.num_layers={layers}", f"model.hidden_size={h}", f"model.num_heads={a}", "model.vocab_size=51200"]
    shape += [f"model.intermediate_size={4 * h}", "model.max_seq_len=2048", "model.tied_head=true", "model.bias=true"]
    shape += ["model.mlp=gelu", "model.norm=layernorm", "model.position=learned", "hardware=h200"]
    assert f"{num_parameters(load(shape).model) / GB:.0f}" == billions
    s, b = 2048, 1
    core = 5 * a * s / h
    unit = s * b * h
    assert layer_activation_bytes(s, b, h, a) == unit * (34 + core)
    baseline = layer_activation_bytes(s, b, h, a, 8)
    assert baseline == unit * (10 + 3 + core / 8)
    assert layer_activation_bytes(s, b, h, a, 8, sequence_parallel=True) == unit * (4.25 + core / 8)
    assert layer_activation_bytes(s, b, h, a, 8, recompute="selective") == unit * 13
    both = layer_activation_bytes(s, b, h, a, 8, sequence_parallel=True, recompute="selective")
    assert both == unit * 4.25
    assert layer_activation_bytes(s, b, h, a, 8, sequence_parallel=True, recompute="full") == unit * 2
    assert 4.9 < baseline / both < 6.3  # "reduces activation memory by 5x"
    assert ends_activation_bytes(s, b, h, 51200) == unit * (1 + 4) + 4 * s * b * 51200


def test_korthikanti_on_a_run() -> None:
    """1b, 4 x 2048 tokens: layers of 34 sbh under a fused kernel, 114 sbh where scores are stored, 2 sbh recomputed."""
    base = ["model=1b", "hardware=h200", "train.micro_batch_size=4", "train.seq_len=2048"]
    unit = 4 * 2048 * 2048
    ends = 5 * unit + 4 * 4 * 2048 * 32000
    assert activation_bytes(load(base)) == 16 * 34 * unit + ends
    assert activation_bytes(load([*base, "attention=eager"])) == 16 * (34 + 80) * unit + ends
    assert activation_bytes(load([*base, "checkpointing=full"])) == 16 * 2 * unit + ends
    assert activation_bytes(load([*base, "checkpointing=every_k"])) == 8 * (34 + 2) * unit + ends
    assert activation_bytes(load([*base, "precision=fp32"])) is None
    assert activation_bytes(load([*base, "checkpointing=selective"])) is None


def installed(module: str, function: str) -> Callable[..., Any]:
    """One arithmetic function of the installed DeepSpeed, without importing the package."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "runtime" / "zero" / module
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    names: dict[str, Any] = {}
    exec(compile(ast.Module([found], []), str(path), "exec"), names)
    return names[function]  # type: ignore[no-any-return]


@pytest.mark.parametrize("gpus", [1, 2, 7])
@pytest.mark.parametrize("psi", [953_223_168, 6_738_415_616])
def test_deepspeed_estimators_are_the_installed_ones(psi: int, gpus: int) -> None:
    zero2 = installed("stage_1_and_2.py", "estimate_zero2_model_states_mem_needs")
    zero3 = installed("stage3.py", "estimate_zero3_model_states_mem_needs")
    assert zero2(psi, num_gpus_per_node=gpus, cpu_offload=False)[1] == zero2_bytes(psi, gpus)
    sharded = zero3(psi, 65_536_000, num_gpus_per_node=gpus, cpu_offload=False, cpu_offload_params=False)
    assert sharded[1] == zero3_bytes(psi, 65_536_000, gpus)


@pytest.mark.parametrize(
    ("formula", "more", "gib"),
    [
        ("deepspeed", ["parallel=zero3"], "8.2"),
        ("deepspeed", ["parallel=zero2"], "9.8"),
        ("eleutherai", ["parallel=zero3"], "39.3"),
        ("eleutherai", ["parallel=zero3", "checkpointing=full"], "19.3"),
        ("hf_blog", ["parallel=zero3"], "80.7"),
    ],
)
def test_what_the_tools_themselves_printed(formula: str, more: list[str], gib: str) -> None:
    """1b on two GPUs, 4 x 2048 tokens each: figures of each tool's own code for the same model, GiB."""
    base = ["model=1b", "hardware=h200", "world_size=2", "train.micro_batch_size=4", "train.seq_len=2048"]
    said = FORMULAS[formula].peak(load([*base, *more]))
    assert said is not None
    assert f"{said / GIB:.1f}" == gib


def test_calculators_by_hand() -> None:
    """hf_anatomy: 18, 16 and 8 bytes per parameter; EleutherAI on one GPU: 18 psi and no buffers."""
    base = ["model=1b", "hardware=h200", "train.micro_batch_size=1", "train.seq_len=2048"]
    psi = 953_223_168
    assert anatomy_bytes(load(base)) == 18 * psi
    assert anatomy_bytes(load([*base, "precision=fp32"])) == 16 * psi
    assert anatomy_bytes(load([*base, "precision=bf16_pure"])) == 8 * psi
    assert anatomy_bytes(load([*base, "optimizer=sgd"])) == 14 * psi
    counted = 2 * 32000 * 2048 + 2048 * 2048 + 16 * (8 * 2048 + 4 * 2048**2 + 3 * 2048 * 5632) + 2 * 2048
    assert eleutherai(load(base)) == 18 * counted + 2048 * 16 * 2048 * (34 + 80)
    # two sequences of one token in fp32: gradients (4 psi) exceed the activations
    assert blog_bytes(load([*base[:2], "train.micro_batch_size=2", "train.seq_len=1"])) == 16 * psi
    assert largest_layer_parameters(load(base).model) == 32000 * 2048


@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula_says_where_it_is_from_and_what_it_lacks(name: str) -> None:
    formula = FORMULAS[name]
    assert formula.missing.startswith("Missing: ")
    assert formula.source
    assert (formula.part is None) == (formula.part_name == "")


def test_against_records() -> None:
    """The lab is nearer than every published formula on the recorded runs, in the median, for every quantity."""
    lines = (EXPERIMENTS / "h200_blind" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 20
    records = list(read_records([EXPERIMENTS / "h200_blind" / "records.jsonl"]))[::4]
    points = evaluate(records, chosen("all"))
    tree = formulas_json(points, chosen("all"))
    assert {p.quantity for p in points} == {"peak", "states", "activations"}
    for name, entry in tree.items():
        for quantity in ("peak", "states", "activations"):
            if quantity in entry:
                everything = entry[quantity]["all"]
                assert everything["lab"]["median_absolute"] < everything["median_absolute"], (name, quantity)
    text = formulas_text(points, chosen("zero_table1"))
    assert "Rajbhandari" in text
    assert "lab worst %" in text


def test_a_point_compares_like_with_like() -> None:
    """The measured peak and today's prediction of it are those of `lab compare`'s residual."""
    source, record = next(iter(read_records([EXPERIMENTS / "h200_blind" / "records.jsonl"])))
    from lab.config import run_config_from_json

    cfg = run_config_from_json(record.config)
    point = next(p for p in evaluate([(source, record)], chosen("hf_anatomy")) if p.quantity == "peak")
    assert point.lab_bytes == predict(cfg).steady.allocated_bytes
    assert record.steady_step is not None
    worst = record.worst("peak_allocated_bytes", record.steady_step)
    assert worst is not None
    assert point.measured_bytes == worst[0]
    assert point.formula_bytes == anatomy_bytes(cfg)


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = (EXPERIMENTS / "h200_blind" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
    assert main(["validate", "--formula", "hf_blog,hf_anatomy", str(few), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert set(tree) == {"hf_blog", "hf_anatomy"}
    assert tree["hf_anatomy"]["peak"]["all"]["runs"] == 3
    assert main(["validate", "--formula", "crystal_ball", str(few)]) == 2
    assert "crystal_ball" in capsys.readouterr().err


def test_unknown_formula() -> None:
    with pytest.raises(ConfigError, match="crystal_ball"):
        chosen("crystal_ball")


def test_a_formula_may_be_named_by_its_beginning() -> None:
    assert [f.name for f in chosen("zero,korthikanti")] == ["zero_table1", "korthikanti"]
    for name in ("hf", "", "zeros"):  # two begin so; all do; none does
        with pytest.raises(ConfigError, match="--formula"):
            chosen(name)
