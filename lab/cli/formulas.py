"""``lab validate --formula``: published formulas held against every recorded run, beside the lab's own prediction."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lab.analytic.published import FORMULAS, Formula
from lab.cli.predictions import predicted
from lab.compare import residuals
from lab.config import ConfigError, RunConfig, run_config_from_json
from lab.record import Residual, RunRecord
from lab.report.text import text_table
from lab.units import error_percent
from lab.vocab import MemoryCategory, MemoryLevel, RunStatus, StepPhase

PEAK = "peak"
PARTS: dict[str, tuple[StepPhase, tuple[MemoryCategory, ...]]] = {
    "states": (
        StepPhase.BACKWARD,
        (
            MemoryCategory.PARAMETERS,
            MemoryCategory.MASTER_WEIGHTS,
            MemoryCategory.GRADIENTS,
            MemoryCategory.OPTIMIZER_STATES,
        ),
    ),
    "activations": (StepPhase.FORWARD, (MemoryCategory.ACTIVATIONS, MemoryCategory.LOGITS_AND_LOSS)),
}


@dataclass(frozen=True)
class Point:
    """One formula, one quantity, one run; ``lab_bytes`` is today's prediction of the same."""

    formula: str
    quantity: str  # peak | states | activations
    source: str
    strategy: str
    formula_bytes: int
    lab_bytes: int
    measured_bytes: int

    @property
    def percent(self) -> float:
        return error_percent(self.formula_bytes, self.measured_bytes) or 0.0

    @property
    def lab_percent(self) -> float:
        return error_percent(self.lab_bytes, self.measured_bytes) or 0.0


def chosen(names: str) -> list[Formula]:
    """``all``, or names or their beginnings with commas between; one that is not one formula's is a ConfigError."""
    if names == "all":
        return list(FORMULAS.values())
    found = []
    for name in names.split(","):
        meant = [name] if name in FORMULAS else [f for f in FORMULAS if name and f.startswith(name)]
        if len(meant) != 1:
            raise ConfigError("--formula", name, f"one of all, {', '.join(FORMULAS)}")
        found.append(FORMULAS[meant[0]])
    return found


def evaluate(
    records: Iterable[tuple[str, RunRecord]],
    formulas: Sequence[Formula],
    today: Callable[[RunConfig], RunConfig] = lambda cfg: cfg,
) -> list[Point]:
    """Every formula on every finished run that its source covers. ``today`` gives the constants of today's tables."""
    points: list[Point] = []
    for source, record in records:
        if record.status is not RunStatus.OK or record.steady_step is None:
            continue
        cfg = today(run_config_from_json(record.config))
        measured = {r.where: r for r in residuals(predicted(cfg), record.ranks) if r.level == MemoryLevel.ALLOCATED}
        for formula in formulas:
            for quantity, function in ((PEAK, formula.peak), (formula.part_name, formula.part)):
                found = _of(quantity, measured)
                said = function(cfg) if function is not None else None
                if said is None or found is None:
                    continue
                strategy = cfg.parallel.strategy.value
                points.append(Point(formula.name, quantity, source, strategy, said, *found))
    return points


def _of(quantity: str, measured: dict[str, Residual]) -> tuple[int, int] | None:
    """(today's prediction, measured) of a quantity; None where the run did not measure it."""
    if quantity == PEAK:
        found = [measured[PEAK]] if PEAK in measured else []
    elif quantity in PARTS:
        phase, categories = PARTS[quantity]
        found = [r for c in categories if (r := measured.get(f"{phase.value}.end.{c.value}")) is not None]
    else:
        found = []
    total = sum(r.measured_bytes for r in found)
    return (sum(r.predicted_bytes for r in found), total) if total else None


def _statistics(percents: Sequence[float]) -> tuple[float, float, float, float]:
    """Median, median of the absolute, 90th percentile of the absolute, the worst with its sign."""
    sizes = sorted(abs(p) for p in percents)
    p90 = statistics.quantiles(sizes, n=10, method="inclusive")[8] if len(sizes) > 1 else sizes[0]
    return statistics.median(percents), statistics.median(sizes), p90, max(percents, key=abs)


def _groups(points: Sequence[Point], by_strategy: bool) -> dict[tuple[str, str, str], list[Point]]:
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        for strategy in ("all", point.strategy) if by_strategy else ("all",):
            groups.setdefault((point.formula, point.quantity, strategy), []).append(point)
    order = list(FORMULAS)  # all strategies of one quantity side by side
    return dict(sorted(groups.items(), key=lambda g: (order.index(g[0][0]), g[0][1] != PEAK)))


def formulas_text(points: Sequence[Point], formulas: Sequence[Formula], by_strategy: bool = False) -> str:
    """One row per formula and quantity, the lab beside it on the same runs, then what each formula lacks."""
    headers = ["formula", "of", "strategy", "runs", "median %", "median |%|", "p90 |%|", "worst %"]
    headers += ["lab median |%|", "lab worst %"]
    rows = []
    for (name, quantity, strategy), group in _groups(points, by_strategy).items():
        median, absolute, p90, worst = _statistics([p.percent for p in group])
        _, lab_absolute, _, lab_worst = _statistics([p.lab_percent for p in group])
        cells = [f"{median:+.1f}", f"{absolute:.1f}", f"{p90:.1f}", f"{worst:+.1f}"]
        cells += [f"{lab_absolute:.3f}", f"{lab_worst:+.3f}"]
        rows.append([name, quantity, strategy, str(len(group)), *cells])
    lines = [
        "published formulas against recorded runs, worst rank, steady step; of the runs that the source covers:",
        "peak: allocated bytes; states: with gradients, at the end of backward; activations: at the end of forward",
        text_table(headers, rows),
        "",
        *(f"{f.name} ({f.source}): {f.missing}" for f in formulas),
    ]
    return "\n".join(lines)


def formulas_json(points: Sequence[Point], formulas: Sequence[Formula]) -> dict[str, Any]:
    """Per formula its source, its missing term, statistics per quantity and strategy, and every point."""
    out: dict[str, Any] = {f.name: {"source": f.source, "missing": f.missing, "points": []} for f in formulas}
    for (name, quantity, strategy), group in _groups(points, True).items():
        keys = ("median", "median_absolute", "p90_absolute", "worst")
        percents, ours = [p.percent for p in group], [p.lab_percent for p in group]
        entry: dict[str, Any] = {"runs": len(group), **dict(zip(keys, _statistics(percents), strict=True))}
        entry["lab"] = dict(zip(keys, _statistics(ours), strict=True))
        out[name].setdefault(quantity, {})[strategy] = entry
    for p in points:
        sizes = {"formula_bytes": p.formula_bytes, "lab_bytes": p.lab_bytes, "measured_bytes": p.measured_bytes}
        out[p.formula]["points"].append({"of": p.quantity, "record": p.source, "strategy": p.strategy, **sizes})
    return out


def show(
    records: Iterable[tuple[str, RunRecord]],
    names: str,
    today: Callable[[RunConfig], RunConfig],
    as_json: bool = False,
    by_strategy: bool = False,
) -> str:
    """What ``lab validate --formula NAMES`` prints. ConfigError for an unknown name or where nothing is covered."""
    formulas = chosen(names)
    points = evaluate(records, formulas, today)
    if not points:
        raise ConfigError("--formula", names, "no finished run there that the formula covers")
    if as_json:
        return json.dumps(formulas_json(points, formulas), indent=1)
    return formulas_text(points, formulas, by_strategy)
