"""Errors of many predictions: per level the median, the 90th percentile and the worst, as text, Markdown or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.report.text import markdown_table, text_table
from lab.vocab import MemoryLevel

STATES = "states"  # parameters, copies, gradients, optimizer: what lies between two steps
LEVELS = (MemoryLevel.ALLOCATED.value, MemoryLevel.RESERVED.value, MemoryLevel.DEVICE_USED.value, STATES)


@dataclass(frozen=True)
class PointError:
    """One quantity of one run: predicted against measured."""

    level: str
    source: str
    strategy: str
    label: str
    predicted_bytes: int
    measured_bytes: int
    precision: str = ""
    study: str = ""
    largest: str = ""  # the residual of this run that is off by most bytes, and by how many
    largest_bytes: int = 0

    @property
    def percent(self) -> float:
        """Signed, predicted over measured minus one."""
        return 100.0 * (self.predicted_bytes / self.measured_bytes - 1.0)


def quantile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the closest ranks; ``values`` not empty."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def as_json(points: int, errors: Sequence[PointError], beyond: Sequence[PointError]) -> dict[str, Any]:
    """The stable object of `lab validate --json`."""

    def entry(e: PointError) -> dict[str, Any]:
        largest = {"where": e.largest, "bytes": e.largest_bytes}
        return {
            "level": e.level,
            "record": e.source,
            "run": e.label,
            "error_percent": e.percent,
            "error_bytes": e.predicted_bytes - e.measured_bytes,
            "largest_residual": largest if e.largest else None,
        }

    out: dict[str, Any] = {"points": points}
    for level, group in _by_level(errors).items():
        strategies = {s: _statistics(g) for s, g in _by("strategy", group).items()}
        out[level] = {**_statistics(group), "strategies": strategies}
    out["precisions"] = {
        level: {p: _statistics(g) for p, g in _by("precision", group).items()}
        for level, group in _by_level(errors).items()
    }
    out["worst_points"] = [entry(e) for e in _worst(errors)]
    out["beyond_tolerance"] = [entry(e) for e in beyond]
    return out


def as_text(points: int, errors: Sequence[PointError], beyond: Sequence[PointError], whose: str) -> str:
    """Per level, strategy and precision, the largest errors, what is beyond tolerance."""
    headers = ["level", "of", "runs", "median %", "p90 %", "worst %"]
    rows = []
    for level, group in _by_level(errors).items():
        for part, members in {"all": group, **_by("strategy", group), **_by("precision", group)}.items():
            rows.append([level, part, str(len(members)), *(f"{v:.2f}" for v in _statistics(members).values())])
    lines = [f"{points} runs; absolute error of {whose}, steady state, worst rank:", text_table(headers, rows)]
    lines += ["", "largest errors of allocated:", _worst_table(errors)]
    lines += [f"beyond tolerance: {e.level} {e.percent:+.2f} % {e.label} {e.source}" for e in beyond]
    return "\n".join(lines)


def _worst_table(errors: Sequence[PointError]) -> str:
    headers = ["error %", "bytes", "largest residual", "bytes there", "run", "record"]
    rows = []
    for e in _worst(errors):
        numbers = [f"{e.percent:+.3f}", f"{e.predicted_bytes - e.measured_bytes:+,}"]
        rows.append([*numbers, e.largest or "-", f"{e.largest_bytes:+,}" if e.largest else "-", e.label, e.source])
    return text_table(headers, rows)


def as_markdown(points: int, errors: Sequence[PointError], whose: str, by: Sequence[str] = ()) -> str:
    """One row per level, and per strategy, precision or study (``by``), with how many are exact, within 0.1, 1, 5 %."""
    headers = ["level", *(["/".join(by)] if by else [])]
    headers += ["runs", "median %", "p90 %", "worst %", "= 0", "≤ 0.1 %", "≤ 1 %", "≤ 5 %"]
    rows = []
    for level, group in _by_level(errors).items():
        parts = {"all": group}
        for what in by:
            parts |= _by(what, group)
        for name, part in parts.items():
            row = [level, *([name] if by else []), str(len(part))]
            row += [f"{v:.2f}" for v in _statistics(part).values()]
            rows.append([*row, *(str(sum(abs(e.percent) <= limit for e in part)) for limit in (0, 0.1, 1, 5))])
    note = (
        f"{points} runs; absolute error of {whose} in percent of the measured peak of the steady step, "
        "maximum across all GPUs; the last four columns count runs, = 0 those that are right to the byte."
    )
    return f"{markdown_table(headers, rows)}\n\n{note}"


def _statistics(errors: Sequence[PointError]) -> dict[str, float]:
    absolute = [abs(e.percent) for e in errors]
    return {"median": quantile(absolute, 0.5), "p90": quantile(absolute, 0.9), "worst": max(absolute)}


def _by_level(errors: Sequence[PointError]) -> dict[str, list[PointError]]:
    groups = {level: [e for e in errors if e.level == level] for level in LEVELS}
    return {level: group for level, group in groups.items() if group}


def _by(what: str, errors: Sequence[PointError]) -> dict[str, list[PointError]]:
    """Errors by strategy, precision or study, in the order in which these come up."""
    return {s: [e for e in errors if getattr(e, what) == s] for s in dict.fromkeys(getattr(e, what) for e in errors)}


def _worst(errors: Sequence[PointError], count: int = 10) -> list[PointError]:
    allocated = [e for e in errors if e.level == MemoryLevel.ALLOCATED]
    return sorted(allocated, key=lambda e: -abs(e.percent))[:count]
