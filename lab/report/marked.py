"""Tables inside Markdown pages, each between two comments, the first of which names the command that made it.

<!-- table: lab compare experiments/zero_stages --markdown -->
...
<!-- /table -->
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

_TABLE = re.compile(r"^<!-- table: (?P<command>.+?) -->\n(?P<body>.*?)^<!-- /table -->$", re.DOTALL | re.MULTILINE)
_OPENING = re.compile(r"^<!-- table:", re.MULTILINE)


@dataclass(frozen=True)
class MarkedTable:
    """One marked table of a page: its command and whether the page holds what the command prints."""

    command: str
    stale: bool


def remake(page: str, run: Callable[[list[str]], str]) -> tuple[str, list[MarkedTable]]:
    """The page with every marked table made anew, and the tables in order.

    ``run`` takes the words after ``lab`` and returns what the command prints. Output that is not Markdown (it has no
    table row) is put in a code block. Raises ValueError for a marker without an end or with another program.
    """
    tables: list[MarkedTable] = []

    def made(match: re.Match[str]) -> str:
        command = match["command"]
        program, *arguments = shlex.split(command)
        if program != "lab":
            raise ValueError(f"marker of a table: {command!r} is no `lab` command")
        text = run(arguments).strip("\n")
        if not re.search(r"^\|", text, re.MULTILINE):
            text = f"```text\n{text}\n```"
        new = f"<!-- table: {command} -->\n\n{text}\n\n<!-- /table -->"
        tables.append(MarkedTable(command, stale=new != match[0]))
        return new

    out = _TABLE.sub(made, page)
    if len(tables) != len(_OPENING.findall(page)):
        raise ValueError("a marker of a table has no end")
    return out, tables
