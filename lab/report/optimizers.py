"""Optimizers side by side: bytes per parameter between steps, and what the step itself needs for a moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lab.compare import comparison_row
from lab.record import PhaseReading, RunRecord
from lab.report.settings import cell, flatten, header
from lab.report.study import machines
from lab.report.table import gib, number, percent
from lab.report.text import markdown_table
from lab.vocab import MemoryCategory, StepPhase

STATES, STEP = MemoryCategory.OPTIMIZER_STATES, StepPhase.OPTIMIZER_STEP
_SHOWN_WHERE_DIFFERENT = ("model.name", "precision.kind", "parallel.strategy", "world_size")
NOTE = (
    "Predicted / measured, on the GPU that holds most. B/param: bytes per GPU over the whole model's parameters. "
    "States: tensors in PyTorch's allocator; managed: paged states, in CUDA managed memory outside it. Step's own: "
    "peak in the optimizer's step less what is allocated at its end, GiB = 2^30 bytes. Error: peak of the steady "
    "step, predicted / measured - 1."
)


def optimizer_table(records: Sequence[RunRecord]) -> str:
    """One Markdown row per record: states, managed states and the step's own peak, predicted beside measured."""
    flat = [flatten(r.config) for r in records]
    settings = [s for s in _SHOWN_WHERE_DIFFERENT if len({repr(c.get(s)) for c in flat}) > 1]
    settings = ["optimizer.kind", "optimizer.implementation", *settings]
    headers = [*map(header, settings), "states B/param", "managed B/param", "step's own GiB", "peak GiB"]
    rows = [
        [*(cell(s, config) for s in settings), *_figures(record)] for record, config in zip(records, flat, strict=True)
    ]
    same = [s for s in _SHOWN_WHERE_DIFFERENT if s not in settings]
    common = ", ".join(f"{header(s)} {cell(s, flat[0])}" for s in same)
    first = f"{len(records)} run{'s' * (len(records) > 1)}, {common}; {machines(records)}."
    return "\n\n".join([first, markdown_table([*headers, "error %", "step s"], rows), NOTE])


def _figures(record: RunRecord) -> list[str]:
    row, prediction = comparison_row(record), record.prediction
    readings = _readings(record)
    if prediction is None or not readings:
        return [str(row["status"]), "-", "-", "-", "-", "-"]
    psi = prediction.num_parameters
    step = prediction.steady.phases[STEP]
    held = max((_states(r) for r in readings), default=0)
    own = max(r.peak_allocated_bytes - r.end_allocated_bytes for r in readings)
    managed = max((r.managed_bytes or 0 for r in record.ranks), default=0)
    predicted_peak, measured_peak = row["predicted_allocated_bytes"], row["measured_allocated_bytes"]
    return [
        f"{prediction.states[STATES] / psi:.3f} / {held / psi:.3f}",
        f"{(prediction.managed_bytes or 0) / psi:.3f} / {managed / psi:.3f}",
        f"{gib(step.peak.total_bytes - step.end.total_bytes, 3)} / {gib(own, 3)}",
        f"{gib(predicted_peak, 3)} / {gib(measured_peak, 3)}",
        percent(row["allocated_error_percent"]),
        number(row["step_seconds"], ".3f"),
    ]


def _readings(record: RunRecord) -> list[PhaseReading]:
    """The optimizer step of the steady step, of every rank."""
    if record.steady_step is None:
        return []
    found = [rank.steps[record.steady_step].phases.get(STEP) for rank in record.ranks]
    return [r for r in found if r is not None]


def _states(reading: PhaseReading) -> int:
    """Bytes of state tensors; with the rests of their blocks in records that do not tell them apart."""
    ledger: Mapping[Any, int] | None = reading.tensors or reading.ledger
    return ledger[STATES] if ledger is not None else 0
