"""Recorded runs as one table: the settings that differ, predicted, measured, error, loss, step time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lab.compare import comparison_row
from lab.record import RunRecord
from lab.report.text import markdown_table, text_table
from lab.units import gib_text, to_gib

# Always shown; every other setting only where runs differ in it.
STANDING: dict[str, str] = {
    "parallel.strategy": "strategy",
    "checkpointing.kind": "checkpointing",
    "precision.kind": "precision",
    "world_size": "ranks",
}
# Never a difference worth a column: where output goes, or a constant of the hardware row.
_HIDDEN = ("overrides", "choices", "launch.", "tracker.", "data.cache_dir", "hardware.")
_SHOWN_ANYWAY = ("hardware.name",)
FOOTNOTE = (
    "Allocated at the peak of the steady step, maximum across all GPUs (ranks); GiB = 2^30 bytes; "
    "error = predicted / measured - 1."
)


def run_table(records: Sequence[RunRecord], markdown: bool = False) -> str:
    """One row per record, in the order given, with the footnote that says what the numbers are."""
    rows = [comparison_row(r) for r in records]
    flat = [_flatten(r.config) for r in records]
    settings = [*STANDING, *differing_settings(flat)]
    headers = [STANDING.get(s, s.removesuffix(".kind").removesuffix(".backend")) for s in settings]
    names = len({r.name for r in records}) > 1
    status = any(r["status"] != "ok" for r in rows)
    if names:
        headers.insert(0, "run")
    if status:
        headers.append("status")
    headers += ["predicted GiB", "measured GiB", "error %", "loss first → last", "step s"]
    digits = _digits([r[k] for r in rows for k in ("predicted_allocated_bytes", "measured_allocated_bytes")])
    cells = []
    for row, config in zip(rows, flat, strict=True):
        line = [str(row["name"])] if names else []
        line += [_setting_text(config.get(s)) for s in settings]
        line += [str(row["status"])] if status else []
        line += [_gib(row["predicted_allocated_bytes"], digits), _gib(row["measured_allocated_bytes"], digits)]
        line += [_percent(row["allocated_error_percent"]), _losses(row), _number(row["step_seconds"], ".3f")]
        cells.append(line)
    table = markdown_table(headers, cells) if markdown else text_table(headers, cells)
    return f"{table}\n\n{FOOTNOTE}"


def differing_settings(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted settings whose values differ between configurations, in schema order, but for those always shown.

    Where models differ in name, the name stands for their shapes. A setting that some configuration
    lacks (an invalid point has none but its overrides) is compared among the others.
    """
    keys = list(dict.fromkeys(k for config in flat for k in config))
    out = []
    for key in keys:
        if key in STANDING or (key.startswith(_HIDDEN) and key not in _SHOWN_ANYWAY):
            continue
        if len({repr(config[key]) for config in flat if key in config}) > 1:
            out.append(key)
    if "model.name" in out:
        out = [k for k in out if k == "model.name" or not k.startswith("model.")]
    return [k for k in out if k != "name"]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out.update(_flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def _setting_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(str(v) for v in value)
    return "-" if value is None else str(value)


def _digits(values: Sequence[int | None]) -> int:
    """Enough digits after the point for three significant ones of the smallest value; 3 at least."""
    smallest = min((to_gib(v) for v in values if v), default=1.0)
    return max(3, min(7, 2 - math.floor(math.log10(smallest))))


def _gib(value: int | None, digits: int) -> str:
    return "-" if value is None else gib_text(value, digits)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    """Two digits and a sign, which a zero has not."""
    return "-" if value is None else format(round(value, 2) or 0.0, "+.2f" if round(value, 2) else ".2f")


def _losses(row: Mapping[str, Any]) -> str:
    first, last = row["first_loss"], row["last_loss"]
    return "-" if first is None or last is None else f"{first:.3f} → {last:.3f}"
