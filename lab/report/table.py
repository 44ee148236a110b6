"""Recorded runs as one table: the settings that differ, predicted, measured, error, loss, step time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lab.compare import comparison_row
from lab.record import RunRecord
from lab.report.settings import STANDING, cell, differing_settings, flatten, header
from lab.report.text import text_table
from lab.units import gib_text, to_gib

FOOTNOTE = (
    "Allocated at the peak of the steady step, maximum across all GPUs (ranks); GiB = 2^30 bytes; "
    "error = predicted / measured - 1."
)


def run_table(records: Sequence[RunRecord]) -> str:
    """One row per record, in the order given, with the footnote that says what the numbers are."""
    rows = [comparison_row(r) for r in records]
    flat = [flatten(r.config) for r in records]
    settings = [*STANDING, *differing_settings(flat)]
    headers = [header(s) for s in settings]
    names = len({r.name for r in records}) > 1
    status = any(r["status"] != "ok" for r in rows)
    if names:
        headers.insert(0, "run")
    if status:
        headers.append("status")
    headers += ["predicted GiB", "measured GiB", "error %", "loss first → last", "step s"]
    digits = digits_for([r[k] for r in rows for k in ("predicted_allocated_bytes", "measured_allocated_bytes")])
    cells = []
    for row, config in zip(rows, flat, strict=True):
        line = [str(row["name"])] if names else []
        line += [cell(s, config) for s in settings]
        line += [str(row["status"])] if status else []
        line += [gib(row["predicted_allocated_bytes"], digits), gib(row["measured_allocated_bytes"], digits)]
        line += [percent(row["allocated_error_percent"]), losses(row), number(row["step_seconds"], ".3f")]
        cells.append(line)
    return f"{text_table(headers, cells)}\n\n{FOOTNOTE}"


def digits_for(values: Sequence[int | None]) -> int:
    """Enough digits after the point for three significant ones of the smallest value; 3 at least."""
    smallest = min((to_gib(v) for v in values if v), default=1.0)
    return max(3, min(7, 2 - math.floor(math.log10(smallest))))


def gib(value: int | None, digits: int) -> str:
    return "-" if value is None else gib_text(value, digits)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def percent(value: float | None) -> str:
    """Two digits and a sign, which a zero has not."""
    return "-" if value is None else format(round(value, 2) or 0.0, "+.2f" if round(value, 2) else ".2f")


def losses(row: Mapping[str, Any]) -> str:
    first, last = row["first_loss"], row["last_loss"]
    return "-" if first is None or last is None else f"{first:.3f} → {last:.3f}"
