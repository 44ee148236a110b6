"""DoRA's replay: every byte has a formula; graphs that a checkpointed region drops itself hold nothing."""

from __future__ import annotations

import pytest

from lab.analytic.step import Replay
from lab.analytic.tape import ALLOC, FREE, MARK
from lab.config import load
from tests.unit.test_engines_explained import unexplained

DORA = ["model=tiny", "adapter=dora", "train.steps=3", "train.seq_len=64"]


@pytest.mark.parametrize("hardware", ["h200", "cpu"])
@pytest.mark.parametrize("precision", ["bf16_pure", "bf16_mixed", "fp32"])
@pytest.mark.parametrize(
    "more", [[], ["adapter.dropout=0.0", "model.bias=true", "checkpointing=full"], ["parallel=ddp", "world_size=2"]]
)
def test_every_byte_has_a_formula(hardware: str, precision: str, more: list[str]) -> None:
    assert unexplained(load([*DORA, f"hardware={hardware}", f"precision={precision}", *more])) == set()


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_nothing_of_a_weight_update_outlives_its_layer(checkpointing: str) -> None:
    """The identity and A of it are saved by a graph that nobody runs: one layer's at a time, none between phases."""
    cfg = load([*DORA, "hardware=cpu", "precision=bf16_mixed", f"checkpointing={checkpointing}"])
    replay = Replay(cfg)
    replay.build()
    replay.step()
    live: dict[int, str] = {}
    layers, at_marks = 0, 0
    for kind, ident, _, _, label, _ in replay.trace.events:
        if kind == ALLOC and label.startswith(("DoRA identity of", "DoRA A of")):
            live[ident] = label.partition(" of ")[2].partition(" input")[0]
        elif kind == FREE:
            live.pop(ident, None)
        elif kind == MARK:
            at_marks = max(at_marks, len(live))
        layers = max(layers, len(set(live.values())))
    linears = 7 * cfg.model.num_layers
    # What a selective policy keeps of a product, it keeps until the recomputation.
    assert (layers, at_marks) == ((1, 0) if checkpointing != "selective" else (linears, linears))
