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
        return {"level": e.level, "record": e.source, "run": e.label, "error_percent": e.percent}

    out: dict[str, Any] = {"points": points}
    for level, group in _by_level(errors).items():
        strategies = {s: _statistics(g) for s, g in _by_strategy(group).items()}
        out[level] = {**_statistics(group), "strategies": strategies}
    out["worst_points"] = [entry(e) for e in _worst(errors)]
    out["beyond_tolerance"] = [entry(e) for e in beyond]
    return out


def as_text(points: int, errors: Sequence[PointError], beyond: Sequence[PointError], whose: str) -> str:
    """Per level and strategy, the largest errors, what is beyond tolerance."""
    headers = ["level", "strategy", "runs", "median %", "p90 %", "worst %"]
    rows = []
    for level, group in _by_level(errors).items():
        for strategy, part in {"all": group, **_by_strategy(group)}.items():
            rows.append([level, strategy, str(len(part)), *(f"{v:.2f}" for v in _statistics(part).values())])
    worst = [
        [f"{e.percent:+.2f}", f"{e.predicted_bytes - e.measured_bytes:+,}", e.label, e.source] for e in _worst(errors)
    ]
    lines = [f"{points} runs; absolute error of {whose}, steady state, worst rank:", text_table(headers, rows)]
    lines += ["", "largest errors of allocated:", text_table(["error %", "bytes", "run", "record"], worst)]
    lines += [f"beyond tolerance: {e.level} {e.percent:+.2f} % {e.label} {e.source}" for e in beyond]
    return "\n".join(lines)


def as_markdown(points: int, errors: Sequence[PointError], whose: str, by_strategy: bool) -> str:
    """One row per level, and per strategy if asked for, with how many runs are within 1 % and within 5 %."""
    headers = ["level", *(["strategy"] if by_strategy else [])]
    headers += ["runs", "median %", "p90 %", "worst %", "≤ 1 %", "≤ 5 %"]
    rows = []
    for level, group in _by_level(errors).items():
        parts = {"all": group, **(_by_strategy(group) if by_strategy else {})}
        for strategy, part in parts.items():
            row = [level, *([strategy] if by_strategy else []), str(len(part))]
            row += [f"{v:.2f}" for v in _statistics(part).values()]
            rows.append([*row, *(str(sum(abs(e.percent) <= limit for e in part)) for limit in (1, 5))])
    note = (
        f"{points} runs; absolute error of {whose} in percent of the measured peak of the steady step, "
        "maximum across all GPUs; the last two columns count runs."
    )
    return f"{markdown_table(headers, rows)}\n\n{note}"


def _statistics(errors: Sequence[PointError]) -> dict[str, float]:
    absolute = [abs(e.percent) for e in errors]
    return {"median": quantile(absolute, 0.5), "p90": quantile(absolute, 0.9), "worst": max(absolute)}


def _by_level(errors: Sequence[PointError]) -> dict[str, list[PointError]]:
    groups = {level: [e for e in errors if e.level == level] for level in LEVELS}
    return {level: group for level, group in groups.items() if group}


def _by_strategy(errors: Sequence[PointError]) -> dict[str, list[PointError]]:
    return {s: [e for e in errors if e.strategy == s] for s in dict.fromkeys(e.strategy for e in errors)}


def _worst(errors: Sequence[PointError], count: int = 10) -> list[PointError]:
    allocated = [e for e in errors if e.level == MemoryLevel.ALLOCATED]
    return sorted(allocated, key=lambda e: -abs(e.percent))[:count]
