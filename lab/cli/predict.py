"""``lab predict``: the prediction of one configuration. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lab.analytic import predict
from lab.cli.arguments import Parser
from lab.config import load
from lab.record import Moment, Prediction, StepPrediction
from lab.report.text import text_table
from lab.units import gib_text, readable
from lab.vocab import MemoryCategory

HELP = """Predicts the memory of one run from its configuration alone: no torch, no GPU.

  lab predict model=7b parallel=zero3 world_size=4 hardware=h200 train.seq_len=2048
  lab predict experiment=zero_stages parallel=zero2 --json
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("predict", HELP)
    parser.add_overrides()
    parser.add_argument("--json", action="store_true", help="the stable JSON object instead of a table")
    arguments = parser.parse(argv)
    prediction = predict(load(arguments.overrides))
    print(json.dumps(prediction.to_cli_json(), indent=1) if arguments.json else prediction_text(prediction))
    return 0


def prediction_text(prediction: Prediction) -> str:
    """Levels at the peak, then phases x categories in GiB, steady state and first step."""
    steady, first = prediction.steady, prediction.first_step
    lines = [
        f"parameters {prediction.num_parameters:,}; worst rank, steady state (first step):",
        f"  allocated   {readable(steady.allocated_bytes):>12}  ({readable(first.allocated_bytes)})",
        f"  reserved    {readable(steady.reserved_bytes):>12}  ({readable(first.reserved_bytes)})",
        f"  device used {readable(steady.device_used_bytes):>12}  ({readable(first.device_used_bytes)})",
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
