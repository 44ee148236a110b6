"""predict(RunConfig) -> Prediction: replay the steps, run the allocator over them, read the moments off."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lab.analytic.assumptions import assumptions
from lab.analytic.boundary import Exhaustion, allocator_limit_bytes, exhaustion, replayed
from lab.analytic.expandable import allocator_of
from lab.analytic.hardware import outside_allocator_bytes
from lab.analytic.inventory import inventory
from lab.analytic.layers import Known, dismantle, replay_steps
from lab.analytic.simulation import Simulation, settle
from lab.analytic.step import Replay
from lab.analytic.timeline import Timeline
from lab.config import RunConfig
from lab.record import PhasePrediction, Prediction, StepPrediction
from lab.vocab import STATE_CATEGORIES, MemoryBreakdown, MemoryLevel, StepPhase

ALLOCATED_ONLY = (
    "allocated level alone: requests as the allocator rounds them, without the rests that it hands out with blocks; "
    "reserved and device_used are lower bounds"
)


def predict(cfg: RunConfig, level: str = MemoryLevel.DEVICE_USED) -> Prediction:
    """Memory of the worst rank at the allocated, reserved and device level, in the first step and when steps repeat.

    On a GPU the caching allocator is simulated, so *allocated* counts blocks as PyTorch's counter does. On a CPU
    nothing rounds or caches: reserved equals allocated, and device use is not predicted beyond it.

    ``level="allocated"``: several times faster, without that simulation. The levels above are then lower bounds, and
    whether the run fits is not said.
    """
    with _collector_paused():
        if level == MemoryLevel.ALLOCATED:
            prediction = _all_ranks(cfg, None, simulated=False)
            if cfg.hardware.device_type == "cuda":
                prediction.assumptions.append(ALLOCATED_ONLY)
            return prediction
        return _with_allocator(cfg)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Replaying makes many objects and few cycles: looking for those takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _with_allocator(cfg: RunConfig) -> Prediction:
    prediction = _all_ranks(cfg, None)
    limit = allocator_limit_bytes(cfg) if cfg.memory_limit_bytes or cfg.hardware.capacity_bytes else None
    if limit is not None:
        prediction.fits = True
        if cfg.memory_limit_bytes or max(s.reserved_bytes for s in (prediction.first_step, prediction.steady)) > limit:
            refused = exhaustion(replayed(cfg), limit)
            if refused is None:
                prediction = _all_ranks(cfg, limit)
            else:
                prediction.assumptions.append(_refusal(limit, refused))
            prediction.fits = refused is None
    return prediction


def _all_ranks(cfg: RunConfig, limit_bytes: int | None, simulated: bool = True) -> Prediction:
    """``limit_bytes``: on what the allocator reserves, and enough to come through; None: none."""
    fresh = Replay(cfg)  # knows the ranks, and is the first ones'
    rule = fresh.rule
    known, runs = Known(), list[_Run]()
    for i, ranks in enumerate(rule.replays()):
        runs += _replay(cfg, ranks, limit_bytes, simulated, None if i else fresh, known)
    first, steady, states, managed = zip(*runs, strict=True)
    worst = max(range(len(runs)), key=lambda i: steady[i].allocated_bytes)
    said = assumptions(cfg, max(managed))
    prediction = Prediction(_worst(steady), _worst(first), states[worst], sum(s.numel for s in inventory(cfg)), said)
    prediction.managed_bytes = max(managed) or None
    return prediction


def _refusal(limit_bytes: int, refused: Exhaustion) -> str:
    when = "build" if refused.step is None else f"step {refused.step}, {refused.phase.value}"
    return (
        f"out of memory in {when} (rank {refused.rank}): {refused.request_bytes} B refused at {limit_bytes} B for "
        "PyTorch's allocator; all figures are those without that limit"
    )


_Run = tuple[StepPrediction, StepPrediction, MemoryBreakdown, int]
"""One rank: its first step, its steady step, its states, and the bytes of those in managed memory."""


def _replay(
    cfg: RunConfig, ranks: list[int], limit_bytes: int | None, simulated: bool, fresh: Replay | None, known: Known
) -> list[_Run]:
    """``ranks``: that one replay serves; ``limit_bytes``: on reserved bytes; enough to come through."""
    replay = replay_steps(cfg, ranks, simulated, fresh=fresh, known=known)
    runs: list[_Run] = []
    for rank in ranks:
        simulation: Simulation | None = None
        blocks: Timeline | None = None
        if replay.gpu and simulated:  # each takes as many steps as its cached segments need to repeat
            simulation = Simulation(allocator_of(cfg)(limit_bytes))
            events = settle(replay, simulation, rank)
            blocks = Timeline(events, sizes=simulation.block_bytes, curve=simulation.allocated)
        tensors = Timeline(replay.rule.events_of(rank), replay.trace.segments)
        runs.append(_read(replay, tensors, blocks or tensors, simulation))
    dismantle(replay)
    return runs


def _read(replay: Replay, tensors: Timeline, timeline: Timeline, simulation: Simulation | None) -> _Run:
    """``timeline``: of the allocator's blocks, where it is simulated, else of tensors."""
    cfg, steady = replay.cfg, (len(simulation.layouts) if simulation else replay.done) - 1
    # What persists is read before zero_grad drops the gradients, and counts tensors without their blocks' rests.
    before = [start for phase, start, _ in tensors.spans[steady] if phase is StepPhase.ZERO_GRAD]
    (first_phases, steady_phases), moments = timeline.read([0, steady], before[:1] if timeline is tensors else ())
    moment = (moments or tensors.moments(before[:1]))[0]
    states = MemoryBreakdown({c: moment.categories[c] for c in STATE_CATEGORIES if moment.categories[c]})
    optimizer = replay.rule.optimizer
    outside = outside_allocator_bytes(cfg) + optimizer.managed_device_bytes

    def step(index: int, by_phase: dict[StepPhase, PhasePrediction]) -> StepPrediction:
        peak = max((p.peak for p in by_phase.values()), key=lambda m: m.total_bytes)
        reserved = peak.total_bytes
        if simulation:
            reserved = max(simulation.reserved[i] for _, start, end in timeline.spans[index] for i in (start, end))
        return StepPrediction(peak.total_bytes, reserved, reserved + outside, peak.categories, by_phase)

    return step(0, first_phases), step(steady, steady_phases), states, optimizer.managed_bytes


def _worst(ranks: Sequence[StepPrediction]) -> StepPrediction:
    """The worst rank at every moment: ranks differ in which phase they need most."""
    top = max(ranks, key=lambda r: r.allocated_bytes)
    by_phase = {
        phase: PhasePrediction(
            end=max((r.phases[phase].end for r in ranks), key=lambda m: m.total_bytes),
            peak=max((r.phases[phase].peak for r in ranks), key=lambda m: m.total_bytes),
        )
        for phase in top.phases
    }
    reserved, device = max(r.reserved_bytes for r in ranks), max(r.device_used_bytes for r in ranks)
    return StepPrediction(top.allocated_bytes, reserved, device, top.categories, by_phase)
