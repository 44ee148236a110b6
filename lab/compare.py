"""Prediction beside measurement. The only module that sees both; neither side ever sees the other.

A residual is always the worst rank's measurement (the largest) against the prediction, which is of the
worst rank too, with the spread over ranks beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lab.record import (
    PhaseReading,
    Prediction,
    RankMeasurement,
    Residual,
    RunRecord,
    StepPrediction,
    skipped_steps,
    steady_step,
)
from lab.units import error_percent
from lab.vocab import STATE_CATEGORIES, MemoryCategory, MemoryLevel, StepPhase

# Level -> PhaseReading field whose largest value over the phases is the step's peak at that level.
PEAK_READINGS: dict[MemoryLevel, str] = {
    MemoryLevel.ALLOCATED: "peak_allocated_bytes",
    MemoryLevel.RESERVED: "peak_reserved_bytes",
    MemoryLevel.DEVICE_USED: "device_used_bytes",
}


def residuals(prediction: Prediction, ranks: list[RankMeasurement]) -> list[Residual]:
    """Predicted minus measured: every level at the peak, every phase's peak and end, categories where a ledger is.

    The steady step is ``lab.record.steady_step``; the first step's entries carry the prefix ``first_step.``, and there
    are none where it was skipped. With measure=off the list is empty.
    """
    finished = min((len(r.steps) for r in ranks), default=0)
    out: list[Residual] = []
    if (steady := steady_step(ranks)) is not None:
        out += _of_step(prediction.steady, ranks, steady, "")
        out += _of_states(prediction.states, ranks, steady)
    if finished >= 1 and 0 not in skipped_steps(ranks):
        out += _of_step(prediction.first_step, ranks, 0, "first_step.")
    if build := prediction.first_step.phases.get(StepPhase.BUILD) or prediction.steady.phases.get(StepPhase.BUILD):
        readings = [(r.rank, r.build) for r in ranks if r.build is not None]
        if readings:
            out += _of_phase("build.", build.peak.total_bytes, build.end.total_bytes, build.end.categories, readings)
    return out


def skip_notes(ranks: list[RankMeasurement]) -> list[str]:
    """One line on the steps that the loss scaler skipped, and what that means for the comparison; else none."""
    skipped = skipped_steps(ranks)
    if not skipped:
        return []
    numbers, last = [s.step for s in ranks[0].steps], min(len(r.steps) for r in ranks) - 1
    which = ", ".join(str(numbers[i]) for i in skipped)
    parts = [f"step{'s' * (len(skipped) > 1)} {which} {'were' if len(skipped) > 1 else 'was'} skipped"]
    parts[0] += ": the loss scaler found an overflow"
    if 0 in skipped:
        parts.append("the first step is not compared")
    steady = steady_step(ranks)
    if steady in skipped:
        parts.append(f"step {numbers[last]} is compared all the same, no step after the first was taken")
    elif steady is not None and steady != last:
        parts.append(f"step {numbers[steady]} stands for the steady state")
    if steady is not None and steady not in skipped and all(i in skipped for i in range(steady)):
        parts.append(f"step {numbers[steady]} is the first that was taken")
    return ["; ".join(parts)]


def _of_step(predicted: StepPrediction, ranks: list[RankMeasurement], index: int, prefix: str) -> list[Residual]:
    out: list[Residual] = []
    totals = {
        MemoryLevel.ALLOCATED: predicted.allocated_bytes,
        MemoryLevel.RESERVED: predicted.reserved_bytes,
        MemoryLevel.DEVICE_USED: predicted.device_used_bytes,
    }
    for level, reading in PEAK_READINGS.items():
        measured = [(r.rank, r.steps[index].peak_bytes(reading)) for r in ranks if r.steps[index].phases]
        # Zero everywhere: this level was not read (no GPU, or measure=off).
        if any(value for _, value in measured):
            out.append(_residual(level, f"{prefix}peak", totals[level], measured))
    for phase, expected in predicted.phases.items():
        readings = [(r.rank, r.steps[index].phases[phase]) for r in ranks if phase in r.steps[index].phases]
        if readings and phase is not StepPhase.BUILD:
            out += _of_phase(
                f"{prefix}{phase.value}.",
                expected.peak.total_bytes,
                expected.end.total_bytes,
                expected.end.categories,
                readings,
            )
    return out


def _of_phase(
    prefix: str,
    peak_bytes: int,
    end_bytes: int,
    end_categories: Mapping[MemoryCategory, int],
    readings: list[tuple[int, PhaseReading]],
) -> list[Residual]:
    allocated = MemoryLevel.ALLOCATED
    out = [
        _residual(allocated, f"{prefix}peak", peak_bytes, [(r, p.peak_allocated_bytes) for r, p in readings]),
        _residual(allocated, f"{prefix}end", end_bytes, [(r, p.end_allocated_bytes) for r, p in readings]),
    ]
    ledgers = [(rank, p.ledger) for rank, p in readings if p.ledger is not None]
    if ledgers:
        for category in MemoryCategory:
            measured = [(rank, ledger[category]) for rank, ledger in ledgers]
            expected = end_categories.get(category, 0)
            if expected or any(value for _, value in measured):
                out.append(_residual(allocated, f"{prefix}end.{category.value}", expected, measured))
    return out


def _of_states(predicted: Mapping[MemoryCategory, int], ranks: list[RankMeasurement], index: int) -> list[Residual]:
    """What lies between two steps, gradients not yet dropped: tensors by their shapes, without rests of blocks."""
    readings = [(r.rank, r.steps[index].phases.get(StepPhase.OPTIMIZER_STEP)) for r in ranks]
    known = [(rank, p.tensors) for rank, p in readings if p is not None and p.tensors is not None]
    return [
        _residual(MemoryLevel.ALLOCATED, f"states.{c.value}", predicted.get(c, 0), [(r, t[c]) for r, t in known])
        for c in STATE_CATEGORIES
        if known and (predicted.get(c, 0) or any(t[c] for _, t in known))
    ]


def _residual(level: MemoryLevel, where: str, predicted: int, measured: Iterable[tuple[int, int]]) -> Residual:
    """The worst rank is the one that measured most."""
    values = list(measured)
    rank, worst = max(values, key=lambda pair: pair[1])
    return Residual(level.value, where, predicted, worst, rank, worst - min(v for _, v in values))


def comparison_row(record: RunRecord, path: str | None = None) -> dict[str, Any]:
    """One run as the stable object of `lab compare --json`; what was not measured or predicted is null."""
    row: dict[str, Any] = {
        "name": record.name,
        "run_id": record.run_id,
        "status": record.status.value,
        "world_size": record.config.get("world_size"),
        "overrides": list(record.config.get("overrides", [])),
    }
    step = record.steady_step
    steady = record.prediction.steady if record.prediction else None
    for level, reading in PEAK_READINGS.items():
        predicted = int(getattr(steady, f"{level.value}_bytes")) if steady else None
        worst = record.worst(reading, step) if step is not None else None
        measured = worst[0] if worst and worst[0] else None
        row[f"predicted_{level.value}_bytes"] = predicted
        row[f"measured_{level.value}_bytes"] = measured
        row[f"{level.value}_error_percent"] = (
            error_percent(predicted, measured) if predicted is not None and measured else None
        )
    allocated = record.worst("peak_allocated_bytes", step) if step is not None else None
    row["measured_spread_bytes"] = allocated[2] if allocated else None
    row["unattributed_bytes"] = _unattributed(record)
    row["step_seconds"] = record.metrics.step_seconds
    row["tokens_per_second"] = record.metrics.tokens_per_second
    row["first_loss"] = record.metrics.first_loss
    row["last_loss"] = record.metrics.last_loss
    row["error"] = record.error
    row["record"] = path
    return row


def _unattributed(record: RunRecord) -> int | None:
    """Bytes without a category: the worst (in size) over ranks and phase ends of the steady step's ledger."""
    step = record.steady_step
    if step is None:
        return None
    values = [
        reading.unattributed_bytes
        for rank in record.ranks
        for reading in rank.steps[step].phases.values()
        if reading.unattributed_bytes is not None
    ]
    return max(values, key=abs, default=None)
