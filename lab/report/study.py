"""A study as Markdown: what every run has in common in one line, then only what differs and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lab.analytic.published.korthikanti import states_and_activations
from lab.analytic.published.zero import zero_table1
from lab.compare import comparison_row
from lab.config import run_config_from_json
from lab.record import PhaseReading, RunRecord
from lab.report.settings import STANDING, cell, differing_settings, flatten, header, overrides_text
from lab.report.table import FOOTNOTE, digits_for, gib, losses, number, percent
from lab.report.text import markdown_table
from lab.units import error_percent
from lab.vocab import MemoryCategory, StepPhase

TEXTBOOK_NOTE = (
    "Textbook (lab/analytic/published): states by ZeRO's Table 1, 16 bytes per parameter before sharding; total with "
    "Korthikanti's activations and logits; both are about Adam in mixed precision only."
)


def study_table(records: Sequence[RunRecord], with_textbook: bool = False, as_overrides: bool = False) -> str:
    """Predicted (before the run), measured, error, reserved, speed; ``with_textbook`` puts the formulas beside them.

    ``as_overrides`` shows each run's own settings in one column, for sets of runs that differ in everything, and the
    loss of the first and the last step.
    """
    columns = StudyColumns(records, as_overrides)
    rows = [comparison_row(r) for r in records]
    status = any(r["status"] != "ok" for r in rows)
    headers = [*columns.headers, *(["status"] if status else []), "predicted GiB", "measured GiB", "error %"]
    headers += ["textbook states GiB", "textbook total GiB", "textbook error %"] if with_textbook else []
    headers += ["reserved GiB", "step s", "tokens/s", *(["loss first → last"] if as_overrides else [])]
    digits = digits_for([r[k] for r in rows for k in ("predicted_allocated_bytes", "measured_allocated_bytes")])
    cells = []
    for record, row, line in zip(records, rows, columns.cells, strict=True):
        line += [str(row["status"])] if status else []
        line += [gib(row["predicted_allocated_bytes"], digits), gib(row["measured_allocated_bytes"], digits)]
        line += [percent(row["allocated_error_percent"])]
        line += _textbook_cells(record, row, digits) if with_textbook else []
        line += [gib(row["measured_reserved_bytes"], digits), number(row["step_seconds"], ".3f")]
        line += [number(row["tokens_per_second"], ",.0f")]
        line += [losses(row)] if as_overrides else []
        cells.append(line)
    notes = f"{FOOTNOTE} {TEXTBOOK_NOTE}" if with_textbook else FOOTNOTE
    return "\n\n".join([columns.common, markdown_table(headers, cells), notes])


def ledger_table(records: Sequence[RunRecord], phase: StepPhase) -> str:
    """Measured bytes of live tensors by category at a phase's end of the steady step, on the rank that holds most."""
    columns = StudyColumns(records)
    ledgers = [_ledger(r, phase) for r in records]
    used = [c for c in MemoryCategory if any(x and x.ledger and x.ledger[c] >= 1 << 20 for x in ledgers)]
    headers = [*columns.headers, *(c.value.replace("_", " ") for c in used), "rest", "total GiB"]
    cells = []
    for reading, line in zip(ledgers, columns.cells, strict=True):
        if reading is None or reading.ledger is None:
            line += ["-"] * (len(used) + 2)
        else:
            shown = [reading.ledger[c] for c in used]
            total = reading.end_allocated_bytes
            line += [gib(v, 3) for v in (*shown, total - sum(shown), total)]
        cells.append(line)
    note = (
        f"Measured in GiB (2^30 bytes) at the end of {phase.value.replace('_', ' ')} of the steady step, on the GPU "
        "that holds most (maximum across all GPUs); rest: categories below 1 MiB, and what the ledger could not place."
    )
    return "\n\n".join([columns.common, markdown_table(headers, cells), note])


class StudyColumns:
    """Columns of settings that differ, and one line of what does not."""

    def __init__(self, records: Sequence[RunRecord], as_overrides: bool = False) -> None:
        flat = [flatten(r.config) for r in records]
        standing = [s for s in STANDING if len({repr(c.get(s)) for c in flat}) > 1]
        settings = [*standing, *differing_settings(flat)]
        same = [f"{header(s)} {cell(s, flat[0])}" for s in STANDING if s not in standing]
        if as_overrides:
            self.headers, self.cells, same = ["settings"], [[overrides_text(c)] for c in flat], []
        else:
            self.headers, self.cells = [header(s) for s in settings], [[cell(s, c) for s in settings] for c in flat]
            if not any(s.startswith("model.") for s in settings):
                same.insert(0, f"model {cell('model.name', flat[0])}")
            shapes = [("train.micro_batch_size", "micro-batch"), ("train.seq_len", "tokens per sequence")]
            same += [f"{name} {cell(s, flat[0])}" for s, name in shapes if s not in settings]
        self.common = ", ".join([f"{len(records)} run{'s' * (len(records) > 1)}", *same]) + f"; {machines(records)}."


def machines(records: Sequence[RunRecord]) -> str:
    """GPUs and versions of the libraries, from the records."""
    devices = dict.fromkeys(rank.device for r in records for rank in r.ranks)
    versions = [r.environment.get("versions", {}) for r in records]
    shown = [
        f"{name} {', '.join(found)}"
        for name in ("torch", "cuda", "nccl", "deepspeed")
        if (found := list(dict.fromkeys(str(v[name]) for v in versions if v.get(name))))
    ]
    return ", ".join([*devices, *shown])


def _textbook_cells(record: RunRecord, row: Mapping[str, Any], digits: int) -> list[str]:
    """States, total and the total's error; dashes where the papers do not cover the run."""
    if record.prediction is None:  # an invalid point has no configuration to ask about
        return ["-", "-", "-"]
    cfg = run_config_from_json(record.config)
    total, measured = states_and_activations(cfg), row["measured_allocated_bytes"]
    error = error_percent(total, measured) if total is not None and measured else None
    return [gib(zero_table1(cfg), digits), gib(total, digits), "-" if error is None else f"{error:+.0f}"]


def _ledger(record: RunRecord, phase: StepPhase) -> PhaseReading | None:
    step = record.steady_step
    readings = [r.steps[step].phases.get(phase) for r in record.ranks] if step is not None else []
    known = [r for r in readings if r is not None and r.ledger is not None]
    return max(known, key=lambda r: r.end_allocated_bytes, default=None)
