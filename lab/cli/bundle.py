"""``lab bundle``: many records into one small file that can be committed and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lab.cli.arguments import Parser
from lab.config import ConfigError
from lab.track.bundle import BUNDLE_SUFFIXES, read_records, write_bundle
from lab.track.select import select

HELP = """Collects records into one JSON Lines file: first and steady step with their ledgers, no host names.

  lab bundle outputs/zero_stages -o experiments/zero_stages/h200.jsonl
  lab bundle experiments/h200_matrix --where model=1b --where world_size=2 -o experiments/zero_stages/records.jsonl
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("bundle", HELP)
    parser.add_records(nargs="+")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="ends in .jsonl or .jsonl.gz")
    arguments = parser.parse(argv)
    output = Path(arguments.output)
    if not output.name.endswith(BUNDLE_SUFFIXES):
        raise ConfigError("--output", output, f"must end in {' or '.join(BUNDLE_SUFFIXES)}")
    found = select(read_records(Path(p) for p in arguments.paths), arguments.where)
    records = [record for _, record in found]
    if not records:
        raise ConfigError("paths", " ".join([*arguments.paths, *arguments.where]), "hold no such record")
    count = write_bundle(output, records)
    print(f"{output}: {count} records, {output.stat().st_size} bytes")
    return 0
