"""``lab validate``: how far today's formulas (or the predictions made before the runs) are from what was measured."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lab.analytic.published import FORMULAS
from lab.cli.arguments import Parser
from lab.cli.formulas import show
from lab.cli.predictions import predicted_each
from lab.compare import comparison_row, residuals
from lab.config import ConfigError, HardwareConfig, RunConfig, load, run_config_from_json
from lab.record import Prediction, Residual, RunRecord
from lab.report.category_errors import (
    UNATTRIBUTED,
    CategoryError,
    categories_json,
    categories_table,
    category_errors,
    difference,
    largest_residual,
)
from lab.report.errors import LEVELS, STATES, PointError, as_json, as_markdown, as_text
from lab.track.bundle import read_records
from lab.track.select import select
from lab.vocab import STATE_CATEGORIES, MemoryCategory, RunStatus, StepPhase

HELP = """Predicts every recorded run again with today's formulas and shows the errors. Exit code 1 beyond a tolerance.

  lab validate                                  every run under outputs/
  lab validate experiments --tolerance-allocated 5 --tolerance-states 0.1
  lab validate experiments --tolerance-unattributed 0.5    measured bytes without a category, percent of the peak
  lab validate experiments --markdown --by-strategy --by-precision --by-category
  lab validate experiments/h200_blind --recorded   the predictions as they were made, before the runs
  lab validate experiments --formula all          published formulas on the same runs, beside the lab
"""
_LOGITS_OR_NOT = (f".{MemoryCategory.ACTIVATIONS.value}", f".{MemoryCategory.LOGITS_AND_LOSS.value}")


def run(argv: Sequence[str]) -> int:
    parser = Parser("validate", HELP)
    parser.add_records()
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="points, and per level median, p90, worst")
    form.add_argument("--markdown", action="store_true", help="a Markdown table, one row per level")
    parser.add_argument("--by-strategy", action="store_true", help="Markdown: rows per strategy too")
    parser.add_argument("--by-precision", action="store_true", help="Markdown: rows per precision too")
    parser.add_argument("--by-study", action="store_true", help="Markdown: rows per study (the runs' name) too")
    parser.add_argument("--level", metavar="L", help=f"Markdown: these alone, with commas: {', '.join(LEVELS)}")
    parser.add_argument("--by-category", action="store_true", help="Markdown: a table of categories instead")
    parser.add_argument("--recorded", action="store_true", help="errors of the predictions written before the runs")
    parser.add_argument(
        "--formula", metavar="NAME", help=f"published formulas, `all` or some of {', '.join(FORMULAS)}, with commas"
    )
    for level in LEVELS:
        parser.add_argument(
            f"--tolerance-{level.replace('_', '-')}", type=float, metavar="P", help=f"largest error of {level}, percent"
        )
    parser.add_argument(
        f"--tolerance-{UNATTRIBUTED}",
        type=float,
        metavar="P",
        help="most bytes without a category, percent of the peak",
    )
    arguments = parser.parse(argv)
    paths = [Path(p) for p in arguments.paths or ["outputs"]]
    if arguments.formula:
        chosen = select(read_records(paths), arguments.where)
        print(show(chosen, arguments.formula, _with_todays_hardware, arguments.json, arguments.by_strategy))
        return 0
    checked = list(check(select(read_records(paths), arguments.where), arguments.recorded, os.cpu_count() or 1))
    errors = [e for run in checked for e in run.errors]
    categories = [c for run in checked for c in run.categories]
    points = sum(bool(run.errors) for run in checked)
    if not points:
        asked = " ".join([*(str(p) for p in paths), *arguments.where])
        raise ConfigError("records", asked, "no finished run with two measured steps there")
    tolerances = {level: getattr(arguments, f"tolerance_{level}") for level in LEVELS}
    beyond = [e for e in errors if (limit := tolerances[e.level]) is not None and abs(e.percent) > limit]
    homeless = _homeless(categories, getattr(arguments, f"tolerance_{UNATTRIBUTED}"))
    whose = "the predictions written before the runs" if arguments.recorded else "today's formulas"
    if arguments.json:
        tree = as_json(points, errors, beyond)
        tree["categories"] = categories_json(categories)
        tree["beyond_tolerance"] += [
            {"level": UNATTRIBUTED, "record": c.source, "run": c.label, "error_percent": c.percent} for c in homeless
        ]
        print(json.dumps(tree, indent=1))
    elif arguments.markdown:
        errors = _of_levels(errors, arguments.level)
        by = [name for name in ("strategy", "precision", "study") if getattr(arguments, f"by_{name}")]
        print(categories_table(categories, True) if arguments.by_category else as_markdown(points, errors, whose, by))
    else:
        print(as_text(points, errors, beyond, whose))
        print("\n".join(["", "by category:", categories_table(categories, False)]))
        for c in homeless:
            print(f"beyond tolerance: {UNATTRIBUTED} {c.percent:+.2f} % {c.label} {c.source}")
    return 1 if beyond or homeless else 0


@dataclass(frozen=True)
class Checked:
    """One finished run: its errors by level and by category."""

    errors: list[PointError]
    categories: list[CategoryError]


def validate(records: Iterable[tuple[str, RunRecord]], recorded: bool = False) -> tuple[int, list[PointError]]:
    """(number of runs, errors of every level measured in them). Runs that did not finish are left out."""
    checked = list(check(records, recorded))
    return sum(bool(run.errors) for run in checked), [e for run in checked for e in run.errors]


def check(records: Iterable[tuple[str, RunRecord]], recorded: bool = False, processes: int = 1) -> Iterator[Checked]:
    """Every finished run against today's prediction, made from the recorded configuration.

    ``recorded``: against the one in the record, written before the run.
    """
    finished = [
        (source, record, run_config_from_json(record.config))
        for source, record in records
        if record.status is RunStatus.OK and record.steady_step is not None
    ]
    predictions: Sequence[Prediction | None]
    if recorded:
        predictions = [record.prediction for _, record, _ in finished]
    else:
        predictions = predicted_each([_with_todays_hardware(cfg) for _, _, cfg in finished], processes)
    for (source, record, cfg), prediction in zip(finished, predictions, strict=True):
        if prediction is None:
            continue
        found = residuals(prediction, record.ranks)
        unattributed = comparison_row(record)["unattributed_bytes"]
        # The ledger knows logits by their width: where another tensor has it, the two cannot be told apart.
        told = [r for r in found if not (cfg.vocab_size_is_ambiguous and r.where.endswith(_LOGITS_OR_NOT))]
        yield Checked(_point_errors(source, cfg, told), category_errors(source, _label(cfg), told, unattributed))


def _of_levels(errors: list[PointError], wanted: str | None) -> list[PointError]:
    """Those of some levels, ``wanted`` with commas; None: all. Raises ConfigError."""
    names = LEVELS if wanted is None else tuple(wanted.split(","))
    for name in names:
        if name not in LEVELS:
            raise ConfigError("--level", name, f"some of {', '.join(LEVELS)}, with commas")
    return [e for e in errors if e.level in names]


def _homeless(categories: Sequence[CategoryError], limit: float | None) -> list[CategoryError]:
    """Runs with more than ``limit`` percent of the peak in no category."""
    return [c for c in categories if c.category == UNATTRIBUTED and limit is not None and abs(c.percent) > limit]


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
    largest = largest_residual(found)

    def error(level: str, predicted: int, measured: int) -> PointError:
        return PointError(
            level,
            source,
            cfg.parallel.strategy.value,
            _label(cfg),
            predicted,
            measured,
            cfg.precision.kind.value,
            cfg.name,
            largest.where if largest else "",
            difference(largest) if largest else 0,
        )

    out = [error(r.level, r.predicted_bytes, r.measured_bytes) for r in found if r.where == "peak"]
    # Tensors where the record has them; an older one has blocks only, with the rests that stay with them.
    states = [r for r in found if r.where.startswith("states.")]
    if not states:
        end = f"{StepPhase.ZERO_GRAD.value}.end."
        states = [r for r in found if r.where.removeprefix(end) in STATE_CATEGORIES]
    if states:
        out.append(error(STATES, sum(r.predicted_bytes for r in states), sum(r.measured_bytes for r in states)))
    return [e for e in out if e.measured_bytes]


def _label(cfg: RunConfig) -> str:
    names = (cfg.model.name, cfg.parallel.strategy.value, cfg.precision.kind.value, cfg.checkpointing.kind.value)
    return f"{' '.join(names)} x{cfg.world_size}"
