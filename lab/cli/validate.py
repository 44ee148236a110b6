"""``lab validate``: how far today's formulas (or the predictions made before the runs) are from what was measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lab.analytic import predict
from lab.analytic.published import FORMULAS
from lab.cli.arguments import Parser
from lab.cli.formulas import show
from lab.compare import residuals
from lab.config import ConfigError, HardwareConfig, RunConfig, load, run_config_from_json
from lab.record import Prediction, Residual, RunRecord
from lab.report.errors import LEVELS, STATES, PointError, as_json, as_markdown, as_text
from lab.track.bundle import read_records
from lab.track.select import select
from lab.vocab import STATE_CATEGORIES, RunStatus, StepPhase

HELP = """Predicts every recorded run again with today's formulas and shows the errors. Exit code 1 beyond a tolerance.

  lab validate                                  every run under outputs/
  lab validate experiments --tolerance-allocated 5 --tolerance-states 0.1
  lab validate experiments/h200_blind --recorded   the predictions as they were made, before the runs
  lab validate experiments --formula all          published formulas on the same runs, beside the lab
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("validate", HELP)
    parser.add_records()
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="points, and per level median, p90, worst")
    form.add_argument("--markdown", action="store_true", help="a Markdown table, one row per level")
    parser.add_argument("--by-strategy", action="store_true", help="Markdown: rows per strategy too")
    parser.add_argument("--recorded", action="store_true", help="errors of the predictions written before the runs")
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
        chosen = select(read_records(paths), arguments.where)
        print(show(chosen, arguments.formula, _with_todays_hardware, arguments.json, arguments.by_strategy))
        return 0
    points, errors = validate(select(read_records(paths), arguments.where), recorded=arguments.recorded)
    if not points:
        asked = " ".join([*(str(p) for p in paths), *arguments.where])
        raise ConfigError("records", asked, "no finished run with two measured steps there")
    tolerances = {level: getattr(arguments, f"tolerance_{level}") for level in LEVELS}
    beyond = [e for e in errors if (limit := tolerances[e.level]) is not None and abs(e.percent) > limit]
    whose = "the predictions written before the runs" if arguments.recorded else "today's formulas"
    if arguments.json:
        print(json.dumps(as_json(points, errors, beyond), indent=1))
    elif arguments.markdown:
        print(as_markdown(points, errors, whose, arguments.by_strategy))
    else:
        print(as_text(points, errors, beyond, whose))
    return 1 if beyond else 0


def validate(records: Iterable[tuple[str, RunRecord]], recorded: bool = False) -> tuple[int, list[PointError]]:
    """(number of runs, errors of every level measured in them). Runs that did not finish are left out.

    The prediction is today's, made from the recorded configuration; with ``recorded`` the one in the record.
    """
    points, errors = 0, []
    for source, record in records:
        if record.status is not RunStatus.OK or record.steady_step is None:
            continue
        cfg = run_config_from_json(record.config)
        prediction: Prediction | None = record.prediction if recorded else predict(_with_todays_hardware(cfg))
        if prediction is None:
            continue
        found = _point_errors(source, cfg, residuals(prediction, record.ranks))
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
    # Tensors where the record has them; an older one has blocks only, with the rests that stay with them.
    states = [r for r in found if r.where.startswith("states.")]
    if not states:
        end = f"{StepPhase.ZERO_GRAD.value}.end."
        states = [r for r in found if r.where.removeprefix(end) in STATE_CATEGORIES]
    if states:
        out.append(error(STATES, sum(r.predicted_bytes for r in states), sum(r.measured_bytes for r in states)))
    return [e for e in out if e.measured_bytes]
