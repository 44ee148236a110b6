"""predict(RunConfig) -> Prediction: replay the steps, run the allocator over them, read the moments off."""

from __future__ import annotations

from collections.abc import Sequence

from lab.analytic.allocator import Simulation, simulate
from lab.analytic.architecture import num_parameters
from lab.analytic.assumptions import assumptions
from lab.analytic.boundary import Exhaustion, allocator_limit_bytes, exhaustion, replayed
from lab.analytic.hardware import outside_allocator_bytes
from lab.analytic.step import Replay
from lab.analytic.timeline import categories_at, phases, spans_of
from lab.config import RunConfig
from lab.record import PhasePrediction, Prediction, StepPrediction
from lab.vocab import STATE_CATEGORIES, MemoryBreakdown, StepPhase


def predict(cfg: RunConfig) -> Prediction:
    """Memory of the worst rank at the allocated, reserved and device level, in the first step and when steps repeat.

    On a GPU the caching allocator is simulated, so *allocated* counts blocks as PyTorch's counter does. On a CPU
    nothing rounds or caches: reserved equals allocated, and device use is not predicted beyond it.
    """
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


def _all_ranks(cfg: RunConfig, limit_bytes: int | None) -> Prediction:
    """``limit_bytes``: on what the allocator reserves, and enough to come through; None: none."""
    runs = [_replay(cfg, rank, limit_bytes) for rank in Replay(cfg).rule.ranks()]
    first, steady, states, managed = zip(*runs, strict=True)
    worst = max(range(len(runs)), key=lambda i: steady[i].allocated_bytes)
    said = assumptions(cfg, max(managed))
    prediction = Prediction(_worst(steady), _worst(first), states[worst], num_parameters(cfg.model), said)
    prediction.managed_bytes = max(managed) or None
    return prediction


def _refusal(limit_bytes: int, refused: Exhaustion) -> str:
    when = "build" if refused.step is None else f"step {refused.step}, {refused.phase.value}"
    return (
        f"out of memory in {when} (rank {refused.rank}): {refused.request_bytes} B refused at {limit_bytes} B for "
        "PyTorch's allocator; all figures are those without that limit"
    )


def _replay(
    cfg: RunConfig, rank: int, limit_bytes: int | None
) -> tuple[StepPrediction, StepPrediction, MemoryBreakdown, int]:
    """One rank: its first step, its steady step, its states, and the bytes of those in managed memory.

    ``limit_bytes``: on reserved bytes; enough to come through.
    """
    replay = Replay(cfg, rank)
    replay.build()
    steady = min(replay.rule.steady_step, cfg.train.steps - 1)
    for _ in range(steady + 1):
        replay.step()
    events = replay.trace.events
    simulation = simulate(events, replay.trace.next_id, limit_bytes) if replay.gpu else None
    # What persists is read before zero_grad drops the gradients.
    before = [start for phase, start, _ in spans_of(events, steady) if phase is StepPhase.ZERO_GRAD]
    moment = categories_at(events, before[:1])[0]
    states = MemoryBreakdown({c: moment.categories[c] for c in STATE_CATEGORIES if moment.categories[c]})
    managed = replay.rule.optimizer.managed_bytes
    return _step(cfg, replay, simulation, 0), _step(cfg, replay, simulation, steady), states, managed


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


def _step(cfg: RunConfig, replay: Replay, simulation: Simulation | None, step: int) -> StepPrediction:
    events = replay.trace.events
    sizes = simulation.block_bytes if simulation else None
    by_phase: dict[StepPhase, PhasePrediction] = phases(events, step, sizes)
    peak = max((p.peak for p in by_phase.values()), key=lambda m: m.total_bytes)
    reserved = peak.total_bytes
    if simulation:
        reserved = max(simulation.reserved[i] for _, start, end in spans_of(events, step) for i in (start, end))
    device = reserved + outside_allocator_bytes(cfg) + replay.rule.optimizer.managed_device_bytes
    return StepPrediction(peak.total_bytes, reserved, device, peak.categories, by_phase)
