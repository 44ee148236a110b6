"""``lab validate``: how far today's formulas are from every recorded measurement."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab.analytic import predict
from lab.analytic.published import FORMULAS
from lab.cli.arguments import Parser
from lab.cli.formulas import show
from lab.compare import residuals
from lab.config import ConfigError, HardwareConfig, RunConfig, load, run_config_from_json
from lab.record import Residual, RunRecord
from lab.report.text import text_table
from lab.track.bundle import read_records
from lab.vocab import MemoryCategory, MemoryLevel, RunStatus, StepPhase

HELP = """Predicts every recorded run again with today's formulas and shows the errors. Exit code 1 beyond a tolerance.

  lab validate                                  every run under outputs/
  lab validate experiments --tolerance-allocated 5 --tolerance-states 0.1
  lab validate experiments --formula all          published formulas on the same runs, beside the lab
"""
STATES = "states"  # parameters, copies, gradients, optimizer: what lies between two steps
_STATE_CATEGORIES = (
    MemoryCategory.PARAMETERS,
    MemoryCategory.MASTER_WEIGHTS,
    MemoryCategory.GRADIENTS,
    MemoryCategory.OPTIMIZER_STATES,
    MemoryCategory.QUANTIZATION_STATE,
)
LEVELS = (MemoryLevel.ALLOCATED.value, MemoryLevel.RESERVED.value, MemoryLevel.DEVICE_USED.value, STATES)


@dataclass(frozen=True)
class PointError:
    """One quantity of one run: predicted today against measured then."""

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


def run(argv: Sequence[str]) -> int:
    parser = Parser("validate", HELP)
    parser.add_argument("paths", nargs="*", metavar="DIR", help="run folders, studies, record files or bundles")
    parser.add_argument("--json", action="store_true", help="points, and per level median, p90, worst")
    parser.add_argument(
        "--formula", metavar="NAME", help=f"published formulas, `all` or some of {', '.join(FORMULAS)}, with commas"
    )
    for level in LEVELS:
        parser.add_argument(
            f"--tolerance-{level.replace('_', '-')}", type=float, metavar="P", help=f"largest error of {level}, percent"
        )
    arguments = parser.parse(argv)
    paths = [Path(p) for p in arguments.paths or ["outputs"]]
    if arguments.formula:
        chosen = read_records(paths)
        print(show(chosen, arguments.formula, _with_todays_hardware, arguments.json))
        return 0
    points, errors = validate(read_records(paths))
    if not points:
        raise ConfigError("records", " ".join(str(p) for p in paths), "no finished run with two measured steps there")
    tolerances = {level: getattr(arguments, f"tolerance_{level}") for level in LEVELS}
    beyond = [e for e in errors if (limit := tolerances[e.level]) is not None and abs(e.percent) > limit]
    print(
        json.dumps(_as_json(points, errors, beyond), indent=1) if arguments.json else _as_text(points, errors, beyond)
    )
    return 1 if beyond else 0


def validate(records: Iterable[tuple[str, RunRecord]]) -> tuple[int, list[PointError]]:
    """(number of runs, errors of every level measured in them). Runs that did not finish are left out."""
    points, errors = 0, []
    for source, record in records:
        if record.status is not RunStatus.OK or record.steady_step is None:
            continue
        cfg = _with_todays_hardware(run_config_from_json(record.config))
        found = _point_errors(source, cfg, residuals(predict(cfg), record.ranks))
        points += bool(found)
        errors += found
    return points, errors


def _with_todays_hardware(cfg: RunConfig) -> RunConfig:
    """The recorded configuration with the constants that the hardware table holds today."""
    try:
        row = _hardware_row(cfg.hardware.name)
    except ConfigError:  # the row is gone: the recorded constants are all there is
        return cfg
    return replace(cfg, hardware=replace(row, gpu_name=cfg.hardware.gpu_name))


@functools.cache
def _hardware_row(name: str) -> HardwareConfig:
    return load([f"hardware={name}"]).hardware


def _point_errors(source: str, cfg: RunConfig, found: list[Residual]) -> list[PointError]:
    strategy = cfg.parallel.strategy.value
    label = f"{cfg.model.name} {strategy} {cfg.precision.kind.value} {cfg.checkpointing.kind.value} x{cfg.world_size}"

    def error(level: str, predicted: int, measured: int) -> PointError:
        return PointError(level, source, strategy, label, predicted, measured)

    out = [error(r.level, r.predicted_bytes, r.measured_bytes) for r in found if r.where == "peak"]
    end = f"{StepPhase.ZERO_GRAD.value}.end."
    states = [r for r in found if r.where.removeprefix(end) in _STATE_CATEGORIES]
    if states:
        out.append(error(STATES, sum(r.predicted_bytes for r in states), sum(r.measured_bytes for r in states)))
    return [e for e in out if e.measured_bytes]


def quantile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the closest ranks; ``values`` not empty."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


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


def _as_json(points: int, errors: Sequence[PointError], beyond: Sequence[PointError]) -> dict[str, Any]:
    def entry(e: PointError) -> dict[str, Any]:
        return {"level": e.level, "record": e.source, "run": e.label, "error_percent": e.percent}

    out: dict[str, Any] = {"points": points}
    for level, group in _by_level(errors).items():
        strategies = {s: _statistics(g) for s, g in _by_strategy(group).items()}
        out[level] = {**_statistics(group), "strategies": strategies}
    out["worst_points"] = [entry(e) for e in _worst(errors)]
    out["beyond_tolerance"] = [entry(e) for e in beyond]
    return out


def _as_text(points: int, errors: Sequence[PointError], beyond: Sequence[PointError]) -> str:
    headers = ["level", "strategy", "runs", "median %", "p90 %", "worst %"]
    rows = []
    for level, group in _by_level(errors).items():
        for strategy, part in {"all": group, **_by_strategy(group)}.items():
            rows.append([level, strategy, str(len(part)), *(f"{v:.2f}" for v in _statistics(part).values())])
    worst = [
        [f"{e.percent:+.2f}", f"{e.predicted_bytes - e.measured_bytes:+,}", e.label, e.source] for e in _worst(errors)
    ]
    lines = [f"{points} runs; absolute error of today's formulas, steady state, worst rank:", text_table(headers, rows)]
    lines += ["", "largest errors of allocated:", text_table(["error %", "bytes", "run", "record"], worst)]
    lines += [f"beyond tolerance: {e.level} {e.percent:+.2f} % {e.label} {e.source}" for e in beyond]
    return "\n".join(lines)
