"""Rows of text -> an aligned plain-text table or a Markdown one. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Right-aligned: numbers with sign, unit or an arrow between two, and the dash of "nothing here".
_NUMBER = re.compile(r"[-+]?[\d.,]+( ?%)?( → [-+]?[\d.,]+)?|-")


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; columns of numbers to the right. No trailing blanks."""
    right = _right_aligned(len(headers), rows)
    widths = [max(len(line[i]) for line in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *(line(r) for r in rows)])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    right = _right_aligned(len(headers), rows)
    rule = "|" + "|".join("---:" if r else "---" for r in right) + "|"
    return "\n".join(["| " + " | ".join(headers) + " |", rule, *("| " + " | ".join(r) + " |" for r in rows)])


def _right_aligned(count: int, rows: Sequence[Sequence[str]]) -> list[bool]:
    return [bool(rows) and all(_NUMBER.fullmatch(r[i]) for r in rows) for i in range(count)]
