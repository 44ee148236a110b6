"""``lab explain``: every predicted byte at one moment, with its formula and source. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby

from lab.analytic.explain import MOMENTS, PEAK, Explanation, Item, explain
from lab.cli.arguments import Parser
from lab.config import ConfigError, load
from lab.record import to_json
from lab.report.text import text_table
from lab.units import gib_text, readable

HELP = """Every predicted byte of the worst rank in the steady step: tensor, formula with its numbers, source.

  lab explain model=7b parallel=zero3 world_size=4 hardware=h200 train.seq_len=2048
  lab explain model=1b hardware=h200 --at forward --json

The total is `lab predict`'s for that moment: a phase's end, or the step's peak. Symbols: lab/analytic/symbols.py.
"""
DIGITS = 4


def run(argv: Sequence[str]) -> int:
    parser = Parser("explain", HELP)
    parser.add_overrides()
    parser.add_argument("--at", default=PEAK, metavar="MOMENT", help=f"{', '.join(MOMENTS)} (default {PEAK})")
    parser.add_argument("--json", action="store_true", help="every item as JSON")
    arguments = parser.parse(argv)
    if arguments.at not in MOMENTS:
        raise ConfigError("--at", arguments.at, f"one of {', '.join(MOMENTS)}")
    explanation = explain(load(arguments.overrides), arguments.at)
    print(json.dumps(to_json(explanation), indent=1) if arguments.json else explanation_text(explanation))
    return 0


def explanation_text(e: Explanation) -> str:
    """Items by category, then sums by category, module and layer."""
    moment = f"the step's peak, in {e.phase}" if e.at == PEAK else f"the end of {e.at}"
    rows = [_row(item) for item in e.items]
    lines = [
        f"{e.total_bytes:,} B = {readable(e.total_bytes)} allocated at {moment}; steady state, worst rank ({e.rank})",
        "",
        text_table(["category", "tensor", "layers", "count", "elements x bytes", "GiB", "formula", "source"], rows),
        "",
        "by category:",
        _sums([(c.value, n) for c, n in sorted(e.categories.items(), key=lambda pair: -pair[1])], e.total_bytes),
        "",
        "by module:",
        _sums([(_module(name, e), n) for name, n in e.modules.items()], e.total_bytes),
        "",
        "by layer:",
        _sums([*_layer_sums(e), ("outside layers", e.outside_layers_bytes)], e.total_bytes),
        "",
        f"of which rounding to the allocator's blocks: {readable(e.rounding_bytes)}",
    ]
    if e.unknown_labels:
        lines.append(f"not in the table of formulas: {', '.join(e.unknown_labels)}")
    return "\n".join(lines)


def _row(item: Item) -> list[str]:
    size = f"{item.numbers} x {item.itemsize}" if item.numbers and item.itemsize else f"{item.tensor_bytes:,} B"
    return [
        item.category.value,
        item.label,
        ranges(item.layers),
        str(item.count),
        size,
        gib_text(item.total_bytes, DIGITS),
        item.formula or item.what,
        item.reference,
    ]


def _module(name: str, e: Explanation) -> str:
    """A block's module with the number of layers that hold something of it."""
    layers = {layer for item in e.items if item.module == name for layer in item.layers}
    return f"{name} x {len(layers)} layers" if layers else name


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'; '' for none."""
    parts: list[str] = []
    for _, group in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        run = [n for _, n in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)


def _layer_sums(e: Explanation) -> Iterator[tuple[str, int]]:
    """Neighbouring layers that hold the same are one row: 'blocks.0-30, 31 x 1.2 GiB'."""
    for size, group in groupby(e.layers.items(), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in group]
        each = f", {len(layers)} x {readable(size)}" if len(layers) > 1 else ""
        yield f"blocks.{ranges(layers)}{each}", size * len(layers)


def _sums(pairs: Sequence[tuple[str, int]], total: int) -> str:
    rows = [[name, f"{n:,}", gib_text(n, DIGITS), f"{100 * n / total:.2f} %"] for name, n in pairs]
    return text_table(["", "bytes", "GiB", "share"], rows)
