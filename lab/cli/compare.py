"""``lab compare``: recorded runs side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.cli.arguments import Parser
from lab.compare import comparison_row
from lab.config import ConfigError
from lab.report.levels import levels_table
from lab.report.optimizers import optimizer_table
from lab.report.study import ledger_table, study_table
from lab.report.table import run_table
from lab.track.bundle import read_records
from lab.track.select import select
from lab.vocab import STEP_PHASES, StepPhase

HELP = """Table of recorded runs: the settings that differ, predicted (before the run), measured, error, speed.

  lab compare                        every run under outputs/
  lab compare outputs/zero_stages    one study
  lab compare experiments --where model=1b --where parallel=zero1,zero2 --markdown
  lab compare experiments/zero_stages --textbook           beside the published formulas, as Markdown
  lab compare experiments/fragmentation --levels           allocated, reserved, device use; what lies between
  lab compare experiments/zero_stages --ledger forward     measured categories at forward's end, as Markdown
  lab compare experiments/optimizers --optimizers          bytes per parameter and the step's own peak, as Markdown
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("compare", HELP)
    parser.add_records()
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list with one object per run")
    form.add_argument("--markdown", action="store_true", help="a Markdown table for a study's page")
    form.add_argument("--textbook", action="store_true", help="the Markdown table with the published formulas beside")
    form.add_argument("--levels", action="store_true", help="allocated, reserved and what the driver sees, as Markdown")
    form.add_argument("--ledger", choices=[p.value for p in STEP_PHASES], help="measured categories at a phase's end")
    form.add_argument("--optimizers", action="store_true", help="states per parameter and the step's own peak")
    parser.add_argument("--overrides", action="store_true", help="Markdown: each run's settings in one column")
    arguments = parser.parse(argv)
    default = Path("outputs")
    paths = [Path(p) for p in arguments.paths] or ([default] if default.is_dir() else [])
    found = list(select(read_records(paths), arguments.where))
    records = [record for _, record in found]
    if arguments.where and not found:
        raise ConfigError("--where", " ".join(arguments.where), "no record has these settings")
    if arguments.json:
        print(json.dumps([comparison_row(record, source) for source, record in found], indent=1))
    elif not found:
        print(f"no records under {', '.join(str(p) for p in paths) or 'outputs/'}", file=sys.stderr)
    elif arguments.optimizers:
        print(optimizer_table(records))
    elif arguments.levels:
        print(levels_table(records, arguments.overrides))
    elif arguments.ledger:
        print(ledger_table(records, StepPhase(arguments.ledger)))
    elif arguments.markdown or arguments.textbook:
        print(study_table(records, arguments.textbook, arguments.overrides))
    else:
        print(run_table(records))
    return 0
