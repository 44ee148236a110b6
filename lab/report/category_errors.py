"""Errors by category of memory: predicted minus measured bytes at a phase's end, as a share of the run's peak.

A category's own percentage says little (2 KiB too much of 1 KiB of temporaries is 200 %), so every error is in percent
of the run's measured allocated peak. One number per run and category: at the phase end where it is largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.record import Residual
from lab.report.errors import quantile
from lab.report.text import markdown_table, text_table
from lab.vocab import STEP_PHASES, MemoryCategory

UNATTRIBUTED = "unattributed"
"""Not an error of the prediction: measured bytes that the ledger could give to no category."""
_MOMENTS = {
    f"{phase.value}.end.{category.value}": category.value for phase in STEP_PHASES for category in MemoryCategory
}
_PHASES = {f"{phase.value}.{moment}" for phase in STEP_PHASES for moment in ("peak", "end")}


@dataclass(frozen=True)
class CategoryError:
    """One category of one run. ``error_bytes``: predicted minus measured; unattributed: the bytes themselves."""

    category: str
    source: str
    label: str
    where: str
    error_bytes: int
    peak_bytes: int

    @property
    def percent(self) -> float:
        """Signed, of the run's measured allocated peak."""
        return 100.0 * self.error_bytes / self.peak_bytes


def category_errors(
    source: str, label: str, found: Sequence[Residual], unattributed_bytes: int | None
) -> list[CategoryError]:
    """Of one run, from its residuals; empty without a ledger."""
    peak = next((r.measured_bytes for r in found if r.where == "peak" and r.level == "allocated"), 0)
    if not peak:
        return []
    largest: dict[str, Residual] = {}
    for r in found:
        category = _MOMENTS.get(r.where)
        if category and (category not in largest or abs(difference(r)) > abs(difference(largest[category]))):
            largest[category] = r
    found_ones = [(c.value, largest[c.value]) for c in MemoryCategory if c.value in largest]
    out = [CategoryError(name, source, label, r.where, difference(r), peak) for name, r in found_ones]
    if unattributed_bytes is not None:
        out.append(CategoryError(UNATTRIBUTED, source, label, "phase end", unattributed_bytes, peak))
    return out


def difference(residual: Residual) -> int:
    return residual.predicted_bytes - residual.measured_bytes


def largest_residual(found: Sequence[Residual]) -> Residual | None:
    """Of the steady step: the category at a phase's end, or else the phase's peak or end, that is off by most bytes."""
    named = [r for r in found if r.where in _MOMENTS] + [r for r in found if r.where in _PHASES]
    return max(named, key=lambda r: abs(difference(r)), default=None)  # of equals the first: the category


def categories_json(errors: Sequence[CategoryError]) -> dict[str, Any]:
    """Category -> how many runs, median, p90 and worst in percent of the peak, the worst in bytes and where."""
    out = {}
    for category, group in _grouped(errors).items():
        absolute = [abs(e.percent) for e in group]
        worst = max(group, key=lambda e: abs(e.percent))
        out[category] = {
            "runs": len(group),
            "median": quantile(absolute, 0.5),
            "p90": quantile(absolute, 0.9),
            "worst": max(absolute),
            "worst_bytes": worst.error_bytes,
            "worst_where": worst.where,
            "worst_record": worst.source,
        }
    return out


def categories_table(errors: Sequence[CategoryError], markdown: bool) -> str:
    """One row per category, in the vocabulary's order, unattributed last."""
    headers = ["category", "runs", "median %", "p90 %", "worst %", "worst bytes", "where"]
    rows = [
        [c.replace("_", " "), str(v["runs"])]
        + [f"{v[key]:.3f}" for key in ("median", "p90", "worst")]
        + [f"{v['worst_bytes']:+,}", f"{v['worst_where'].replace('_', ' ')}"]
        for c, v in categories_json(errors).items()
    ]
    note = (
        "Predicted minus measured bytes of a category at the phase end where they are furthest apart, in percent of "
        "the run's measured allocated peak; unattributed: measured bytes without a category."
    )
    return f"{markdown_table(headers, rows) if markdown else text_table(headers, rows)}\n\n{note}"


def _grouped(errors: Sequence[CategoryError]) -> dict[str, list[CategoryError]]:
    order = [*(c.value for c in MemoryCategory), UNATTRIBUTED]
    groups = {c: [e for e in errors if e.category == c] for c in order}
    return {c: group for c, group in groups.items() if group}
