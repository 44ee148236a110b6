"""ZeRO's stages 1 and 2: ranks that are replayed together do what each does by itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lab.analytic import predict
from lab.analytic.allocator import Allocator
from lab.analytic.layers import replay_steps
from lab.analytic.segments import spelled_out
from lab.analytic.sharding.zero import ZeroRule
from lab.analytic.simulation import Simulation, settle
from lab.analytic.step import Replay
from lab.analytic.tape import ALLOC, FREE, MOVE, Event
from lab.config import load
from tests.unit.zero_cases import SMALL

BUCKET = "parallel.zero.reduce_bucket_size=1000"  # the embedding and the head are larger
BOTH_STAGES = [
    [],
    ["parallel.zero.reduce_bucket_size=3000"],
    ["parallel.zero.reduce_bucket_size=3000", "train.gradient_accumulation_steps=3"],
    ["parallel.zero.reduce_scatter=false", "precision=bf16_pure"],
    ["parallel.zero.round_robin_gradients=true", "model.tied_head=true"],
    ["adapter=lora", "adapter.target_modules=[q_proj]", "engine=accelerate"],
    ["precision=fp32", "train.max_grad_norm=1.0", "checkpointing=full"],
]
STAGE_2 = [
    [BUCKET],
    [BUCKET, "train.gradient_accumulation_steps=3"],
    [BUCKET, "parallel.zero.overlap_comm=true", "train.gradient_accumulation_steps=2"],
]
TOGETHER = [
    *(["parallel=zero1", *options] for options in BOTH_STAGES),
    *(["parallel=zero2", *options] for options in (*BOTH_STAGES, *STAGE_2)),
]


def numbered(events: Sequence[Event]) -> list[Event]:
    """Storages numbered in the order in which they are made."""
    names: dict[int, int] = {}
    out: list[Event] = []
    for kind, ident, nbytes, category, label, stream in events:
        if kind == ALLOC:
            names[ident] = len(names)
        number = names[ident] if kind in (ALLOC, FREE, MOVE) else -1
        out.append((kind, number, nbytes, category, label, stream))
    return out


@pytest.mark.parametrize("hardware", ["cpu", "h200"])
@pytest.mark.parametrize("options", TOGETHER, ids=" ".join)
def test_event_by_event(options: list[str], hardware: str) -> None:
    cfg = load([*SMALL, "world_size=3", f"hardware={hardware}", "train.steps=3", *options])
    shared = replay_steps(cfg, [0, 1, 2])
    for rank in range(3):
        alone = replay_steps(cfg, rank)
        events = spelled_out(shared.rule.events_of(rank), shared.trace.segments)
        assert numbered(events) == numbered(spelled_out(alone.trace.events, alone.trace.segments))
        assert any(e[4] == "grads_in_partition" for e in events)


@pytest.mark.parametrize("options", TOGETHER, ids=" ".join)
def test_with_the_allocator_each_takes_its_own_steps(options: list[str]) -> None:
    """As many, and to the same blocks, as replayed alone: also the first one, when others have gone on."""
    cfg = load([*SMALL, "world_size=3", "hardware=h200", "train.steps=9", *options])
    shared = replay_steps(cfg, [0, 1, 2])
    for rank in (2, 0, 1, 2):
        alone, together, apart = replay_steps(cfg, rank), Simulation(Allocator()), Simulation(Allocator())
        events = settle(shared, together, rank)
        assert numbered(events) == numbered(settle(alone, apart))
        assert (together.allocated, together.reserved) == (apart.allocated, apart.reserved)
        assert together.layouts == apart.layouts
        assert len(together.layouts) == alone.done


@pytest.mark.parametrize(
    ("strategy", "options", "alone"),
    [
        ("zero1", [], False),
        ("zero2", [], False),
        ("zero1", ["parallel.zero.overlap_comm=true"], True),
        ("zero2", ["parallel.zero.overlap_comm=true"], False),
        ("zero1", ["parallel.zero.contiguous_gradients=false"], True),
        ("zero2", ["parallel.zero.contiguous_gradients=false"], True),
        ("zero1", [BUCKET], True),
        ("zero2", [BUCKET], False),
    ],
)
def test_where_ranks_differ_in_more_than_their_partitions(strategy: str, options: list[str], alone: bool) -> None:
    rule = Replay(load([*SMALL, f"parallel={strategy}", "world_size=6", "hardware=cpu", *options])).rule
    assert isinstance(rule, ZeroRule)
    together = rule.replays()
    assert [rank for ranks in together for rank in ranks] == rule.ranks()
    assert len(together) == (len(rule.ranks()) if alone else 1)


def test_prediction_is_the_worst_of_ranks_replayed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(["model=25m", "parallel=zero2", "world_size=6", "hardware=h200"])
    assert len(Replay(cfg).rule.ranks()) > 1
    together = predict(cfg, "allocated")
    monkeypatch.setattr(ZeroRule, "replays", lambda self: [[rank] for rank in self.ranks()])
    assert predict(cfg, "allocated") == together
