"""``lab predict``: the prediction of one configuration. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lab.analytic import predict
from lab.analytic.boundary import TIGHT_BYTES, least_limit_bytes, replayed
from lab.analytic.curve import memory_curve
from lab.cli.arguments import Parser
from lab.cli.points import Point, study_points
from lab.cli.predictions import predicted
from lab.config import RunConfig, load
from lab.curve import write_curve
from lab.record import Moment, Prediction, StepPrediction
from lab.report.text import markdown_table, text_table
from lab.units import gib_text, readable
from lab.vocab import MemoryCategory

HELP = """Predicts the memory of one run from its configuration alone: no torch, no GPU.

  lab predict model=7b parallel=zero3 world_size=4 hardware=h200 train.seq_len=2048
  lab predict experiment=zero_stages parallel=zero2 --json
  lab predict experiment=zero_stages --points                     every point of a study
  lab predict model=7b world_size=8 hardware=h200 parallel=zero2,zero3 checkpointing=none,full --points
  lab predict model=1b hardware=h200 --curve curve.csv            allocations and frees of the steady step, in order
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("predict", HELP)
    parser.add_overrides()
    parser.add_argument("--json", action="store_true", help="the stable JSON object instead of a table")
    parser.add_argument("--points", action="store_true", help="a Markdown table: a study's points, or those of a=x,y")
    parser.add_argument("--curve", metavar="FILE", help="write the steady step's memory curve, .json or .csv")
    arguments = parser.parse(argv)
    if arguments.points:
        print(points_text(study_points(arguments.overrides)))
        return 0
    cfg = load(arguments.overrides)
    prediction = predict(cfg)
    if arguments.curve:
        write_curve(Path(arguments.curve), memory_curve(cfg))
    if arguments.json:
        print(json.dumps(prediction.to_cli_json(), indent=1))
    else:
        print(prediction_text(prediction, cfg.hardware.capacity_bytes, limit_text(cfg)))
    return 0


def points_text(points: Sequence[Point]) -> str:
    """One row per point, steady state, worst rank; a point that breaks a rule shows the reason."""
    rows = []
    for point in points:
        label = point.label or " ".join(point.overrides)
        if point.cfg is None:
            rows.append([label, f"invalid: {point.reason}", "-", "-"])
        else:
            steady = predicted(point.cfg).steady
            levels = (steady.allocated_bytes, steady.reserved_bytes, steady.device_used_bytes)
            rows.append([label, *(gib_text(v) for v in levels)])
    note = "Predicted peak of the steady step, maximum across all GPUs (ranks); GiB = 2^30 bytes."
    return f"{markdown_table(['settings', 'allocated GiB', 'reserved GiB', 'device used GiB'], rows)}\n\n{note}"


def fit_text(prediction: Prediction, capacity_bytes: int) -> str:
    """Does the larger of first and steady step's device use fit the GPU, and with how much to spare?"""
    need = max(prediction.steady.device_used_bytes, prediction.first_step.device_used_bytes)
    verdict = "fits" if need <= capacity_bytes else "does not fit"
    margin = f"{readable(abs(capacity_bytes - need))} {'to spare' if need <= capacity_bytes else 'too much'}"
    return f"  capacity    {readable(capacity_bytes):>12}  {verdict}, {margin}"


def limit_text(cfg: RunConfig) -> str:
    """Does the run come through under train.memory_limit_gib, and with how much to spare? Empty without a limit."""
    limit = cfg.memory_limit_bytes
    if limit is None:
        return ""
    need = least_limit_bytes(replayed(cfg), limit)
    margin = f"{readable(abs(limit - need))} {'to spare' if need <= limit else 'too much'}"
    tight = ", less than a segment" if 0 <= limit - need < TIGHT_BYTES else ""
    return f"  limit       {readable(limit):>12}  {'fits' if need <= limit else 'does not fit'}, {margin}{tight}"


def prediction_text(prediction: Prediction, capacity_bytes: int = 0, limit: str = "") -> str:
    """Levels at the peak, whether they fit, then phases x categories in GiB, steady state and first step."""
    steady, first = prediction.steady, prediction.first_step
    lines = [
        f"parameters {prediction.num_parameters:,}; worst rank, steady state (first step):",
        f"  allocated   {readable(steady.allocated_bytes):>12}  ({readable(first.allocated_bytes)})",
        f"  reserved    {readable(steady.reserved_bytes):>12}  ({readable(first.reserved_bytes)})",
        f"  device used {readable(steady.device_used_bytes):>12}  ({readable(first.device_used_bytes)})",
        *([fit_text(prediction, capacity_bytes)] if capacity_bytes else []),
        *([limit] if limit else []),
        "",
        "allocated bytes by phase and category, steady state, GiB = 2^30 bytes:",
        _phase_table(steady),
    ]
    if prediction.assumptions:
        lines += ["", "assumptions:", *(f"  - {a}" for a in prediction.assumptions)]
    return "\n".join(lines)


def _phase_table(step: StepPrediction) -> str:
    moments: list[tuple[str, Moment]] = [
        (f"{phase.value} {kind}", moment)
        for phase, predicted in step.phases.items()
        for kind, moment in (("peak", predicted.peak), ("end", predicted.end))
    ]
    used = [c for c in MemoryCategory if any(m.categories.get(c, 0) for _, m in moments)]
    smallest = min((m.categories[c] for _, m in moments for c in used if m.categories.get(c, 0)), default=0)
    digits = 3 if smallest >= 1 << 20 else 6
    rows = [
        [label, gib_text(m.total_bytes, digits), *(gib_text(m.categories.get(c, 0), digits) for c in used)]
        for label, m in moments
    ]
    return text_table(["moment", "total", *(c.value for c in used)], rows)
