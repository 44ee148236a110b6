"""`lab explain`: totals are the prediction's to the byte, and every formula gives the bytes of its tensor."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lab.analytic import predict
from lab.analytic.explain import MOMENTS, PEAK, Live, _LayeredReplay, described, explain
from lab.analytic.families.names import in_lab_words
from lab.analytic.sources import SOURCES, parameter_of, source_of
from lab.analytic.symbols import evaluations, names_in, values_of
from lab.analytic.tape import ALLOC, FREE
from lab.analytic.timeline import spans_of
from lab.cli.explain import ranges
from lab.cli.main import main
from lab.config import load
from lab.vocab import MemoryCategory, StepPhase, Strategy

SMALL = ["model=tiny", "model.num_layers=3", "data.tokenizer_vocab_size=2048", "hardware=h200"]
GPT2 = ["model.norm=layernorm", "model.mlp=gelu", "model.position=learned", "model.bias=true", "model.fused_qkv=true"]
SCALE = ["train.micro_batch_size=2", "train.gradient_accumulation_steps=2", "train.max_grad_norm=1.0"]
OPTIONS = {
    "plain": [],
    "checkpointed": ["checkpointing=full", "loss=chunked"],
    "selective": ["checkpointing=selective", "precision=bf16_pure"],
    "gpt2": [*GPT2, "model.tied_head=true", "model.dropout=0.1"],
    "in place": ["loss=in_place"],
    "no upcast": ["loss=no_upcast"],
    "in place, fp32": ["loss=in_place", "precision=fp32"],
    "eager, GQA": ["attention=eager", "model.num_kv_heads=2"],
    "math": ["attention=math", "model.num_kv_heads=2", "precision=fp32"],
    "memory-efficient": ["attention=mem_efficient"],
    "memory-efficient, fp32": ["attention=mem_efficient", "precision=fp32"],
    "flash, GQA": ["attention=flash", "model.num_kv_heads=1", "precision=bf16_pure"],
    "padded heads": ["attention=flash", "model.head_dim=36", "model.num_kv_heads=2"],
    "fp16": ["precision=fp16_mixed", "model.vocab_size=2049", *SCALE],
    "long": ["train.seq_len=2048", "train.micro_batch_size=2", "model.vocab_size=2049"],
    "foreach": ["optimizer.implementation=foreach"],
    "for_loop, sgd": ["optimizer=sgd", "optimizer.implementation=for_loop"],
    "8-bit Adam": ["optimizer=adamw_8bit"],
    "paged": ["optimizer=paged_adamw_32bit"],
    "paged, 8-bit": ["optimizer=paged_adamw_8bit", "optimizer.min_8bit_size=20000"],
    "Lion, cpu": ["optimizer=lion_8bit", "hardware=cpu"],
    "Adafactor": ["optimizer=adafactor", "precision=bf16_pure"],
    "Adafactor, foreach": ["optimizer=adafactor", "optimizer.implementation=foreach"],
    "cpu": ["hardware=cpu", *SCALE],
    "cpu, gpt2": ["hardware=cpu", *GPT2, "model.dropout=0.1", "precision=fp32"],
}

NO_FSDP = ("8-bit Adam", "paged", "paged, 8-bit", "Lion, cpu", "Adafactor", "Adafactor, foreach")


def overrides(strategy: Strategy, *more: str) -> list[str]:
    given = {o.partition("=")[0] for o in more}
    world = 1 if strategy is Strategy.SINGLE else 4 if strategy is Strategy.HSDP else 3
    base = [*SMALL, f"parallel={strategy.value}", f"world_size={world}"]
    return [*(o for o in base if o.partition("=")[0] not in given), *more]


@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("strategy", Strategy)
def test_the_total_is_the_prediction(strategy: Strategy, at: str) -> None:
    for more in (SCALE, ["checkpointing=full"]):
        cfg = load(overrides(strategy, *more))
        steady, explained = predict(cfg).steady, explain(cfg, at)
        if at == PEAK:
            assert explained.total_bytes == steady.allocated_bytes
            assert explained.categories == {c: n for c, n in steady.categories.items() if n}
        else:
            end = steady.phases[StepPhase(at)].end
            assert explained.total_bytes == end.total_bytes
            assert explained.categories == {c: n for c, n in end.categories.items() if n}
        assert sum(i.total_bytes for i in explained.items) == explained.total_bytes
        assert sum(explained.modules.values()) == explained.total_bytes
        assert sum(explained.layers.values()) + explained.outside_layers_bytes == explained.total_bytes


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("strategy", Strategy)
def test_every_formula_gives_the_bytes_of_its_tensor(strategy: Strategy, options: str) -> None:
    """All storages that live at some time of the steady step: known to the table, and its formula gives their bytes."""
    if strategy.is_fsdp and options in NO_FSDP:
        pytest.skip("refused: see lab.config.rules")
    cfg = load(overrides(strategy, *OPTIONS[options]))
    replay = _LayeredReplay(cfg, 0)
    replay.build()
    for _ in range(replay.rule.steady_step + 1):
        replay.step()
    events = replay.trace.events
    start = min(first for _, first, _ in spans_of(events, replay.rule.steady_step))
    freed = {e[1] for e in events[:start] if e[0] == FREE}
    storages = [
        Live(e[1], i, MemoryCategory(e[3]), in_lab_words(e[4]), e[2], e[2])
        for i, e in enumerate(events)
        if e[0] == ALLOC and e[1] not in freed
    ]
    open_ones = set()
    for storage, _, item in described(cfg, replay, storages):
        rule = source_of(storage.label)
        assert rule is not None, f"no formula for {storage.label!r}: a line in lab/analytic/sources.py is missing"
        if rule.formulas and item.formula is None:
            open_ones.add((storage.label, storage.tensor_bytes))
    assert not open_ones


def test_activations_are_told_by_layer() -> None:
    """Twelve layers that hold the same: log-sum-exp of b n s fp32 numbers, one per layer."""
    cfg = load(["model=125m", "hardware=h200", "train.micro_batch_size=4", "train.seq_len=1024"])
    explained = explain(cfg, "forward")
    (lse,) = [i for i in explained.items if i.label == "log-sum-exp"]
    assert (lse.formula, lse.numbers, lse.itemsize) == ("b * n * s", "4 * 12 * 1024", 4)
    assert (lse.tensor_bytes, lse.count, lse.layers) == (4 * 12 * 1024 * 4, 12, list(range(12)))
    assert list(explained.layers) == list(range(12))


def test_optimizer_state_is_told_by_layer_where_it_is_one_tensor_per_parameter() -> None:
    cfg = load(overrides(Strategy.SINGLE))
    moments = [i for i in explain(cfg, "zero_grad").items if i.label == "exp_avg"]
    assert {layer for i in moments for layer in i.layers} == {0, 1, 2}
    assert {i.module for i in moments} >= {"embedding", "head", "blocks.*.mlp", "blocks.*.attention"}


def test_flat_states_belong_to_no_layer() -> None:
    cfg = load(overrides(Strategy.ZERO2))
    (moment,) = [i for i in explain(cfg, "zero_grad").items if i.label == "exp_avg"]
    assert (moment.module, moment.layers, moment.formula) == ("all parameters", [], "up(psi, 2 * N) // N")


def test_symbols_are_all_known() -> None:
    known = {*values_of(load(SMALL)), "w", "w0", "w1"}
    assert [(s.what, f) for s in SOURCES for f in s.formulas if not set(names_in(f)) <= known] == []


def test_formulas_are_arithmetic_only() -> None:
    assert [v for v, _ in evaluations("cdiv(a, 2) * up(b, 4) - a // 2", {"a": (5,), "b": (6,)})] == [3 * 8 - 2]
    assert [v for v, _ in evaluations("c * 2", {"c": (3, 1)})] == [6, 2]
    assert list(evaluations("a * unknown", {"a": (5,)})) == []
    with pytest.raises(ValueError, match="not a formula"):
        list(evaluations("a if a else b", {"a": (1,), "b": (2,)}))


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("gradient of blocks.0.mlp_norm weight", "blocks.0.mlp_norm.weight"),
        ("gradient of blocks.1.mlp.up_proj.weight bias", "blocks.1.mlp.up_proj.bias"),
        ("gathered head.weight", "head.weight"),
        ("silu", None),
    ],
)
def test_labels_name_their_parameter(label: str, name: str | None) -> None:
    assert parameter_of(label) == name


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *overrides(Strategy.ZERO3), "--json", "--at", "backward"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert sum(i["total_bytes"] for i in tree["items"]) == tree["total_bytes"] == sum(tree["categories"].values())
    assert tree["unknown_labels"] == []
    assert main(["explain", *overrides(Strategy.FSDP)]) == 0
    text = capsys.readouterr().out
    assert "x 3 layers" in text
    assert "b * s * h" in text
    assert main(["explain", *SMALL, "--at", "lunch"]) == 2
    assert "--at=lunch" in capsys.readouterr().err


def test_ranges() -> None:
    assert ranges([2, 0, 1, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges([]) == ""


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys; from lab.cli.main import main; main(['explain', *sys.argv[1:]]); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, *overrides(Strategy.ZERO2)], check=True, capture_output=True, timeout=60
    )
