"""``lab tables``: every marked table of the READMEs, made anew from the committed records."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.cli.arguments import Parser
from lab.cli.predictions import predictions_kept
from lab.config import ConfigError
from lab.report.marked import remake

HELP = """Rewrites every table between `<!-- table: lab COMMAND -->` and `<!-- /table -->` in README.md and
experiments/*/README.md with what the command prints. To be run after a change of formulas or records.

  lab tables            rewrites; says which tables changed
  lab tables --check    changes nothing; exit code 1 if a table is not what its command prints
"""
ROOT = Path(__file__).resolve().parents[2]


def run(argv: Sequence[str]) -> int:
    parser = Parser("tables", HELP)
    parser.add_argument("pages", nargs="*", metavar="FILE", help="other pages than the repository's own")
    parser.add_argument("--check", action="store_true", help="only look")
    arguments = parser.parse(argv)
    pages = [Path(p).resolve() for p in arguments.pages] or [ROOT / "README.md", *ROOT.glob("experiments/*/README.md")]
    with predictions_kept():  # several tables, also of several pages, show the same records
        stale = sum(_page(page, arguments.check) for page in sorted(pages))
    if arguments.check and stale:
        print(f"lab: {stale} stale; `lab tables` makes them anew", file=sys.stderr)
        return 1
    return 0


def _page(page: Path, only_look: bool) -> int:
    """One page's tables made anew, and written unless ``only_look``; how many were stale."""
    if not page.is_file():
        raise ConfigError("FILE", page, "no such file")
    text = page.read_text(encoding="utf-8")
    try:
        new, tables = remake(text, printed)
    except ValueError as error:
        raise ConfigError("FILE", page, str(error)) from None
    changed = [t for t in tables if t.stale]
    for table in changed:
        print(f"{page}: {'stale' if only_look else 'made anew'}: {table.command}")
    if not only_look and new != text:
        page.write_text(new, encoding="utf-8")
    return len(changed)


def printed(arguments: Sequence[str]) -> str:
    """What a `lab` command prints, run in the repository's root. Raises ConfigError where it fails."""
    from lab.cli.main import main

    out = io.StringIO()
    with _in_root(), contextlib.redirect_stdout(out):
        code = main(arguments)
    if code != 0:
        raise ConfigError("table", f"lab {' '.join(arguments)}", f"the command ends with exit code {code}")
    return out.getvalue()


@contextlib.contextmanager
def _in_root() -> Iterator[None]:
    """Paths in a marker are the repository's, wherever the command is given."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(before)
