"""``lab compare``: recorded runs side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.cli.arguments import Parser
from lab.compare import comparison_row
from lab.report.table import run_table
from lab.track.bundle import read_records

HELP = """Table of recorded runs: the settings that differ, predicted, measured, error, step time.

  lab compare                        every run under outputs/
  lab compare outputs/zero_stages    one study
  lab compare experiments/*/*.jsonl --markdown
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("compare", HELP)
    parser.add_argument("paths", nargs="*", metavar="DIR", help="run folders, studies, record files or bundles")
    parser.add_argument("--json", action="store_true", help="a list with one object per run")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    arguments = parser.parse(argv)
    default = Path("outputs")
    paths = [Path(p) for p in arguments.paths] or ([default] if default.is_dir() else [])
    found = list(read_records(paths))
    if arguments.json:
        print(json.dumps([comparison_row(record, source) for source, record in found], indent=1))
    elif found:
        print(run_table([record for _, record in found], markdown=arguments.markdown))
    else:
        print(f"no records under {', '.join(str(p) for p in paths) or 'outputs/'}", file=sys.stderr)
    return 0
