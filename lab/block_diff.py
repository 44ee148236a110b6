"""Predicted against measured blocks at the peak: what is on one side and not on the other.

A residual is a tensor: blocks of equal size cancel, what remains is named, by the replay's label on the predicted
side and by the Python line that made it on the measured one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lab.analytic.explain import Live
from lab.history import HistoryBlock


@dataclass(frozen=True)
class Leftover:
    """Blocks of one size that only one side has."""

    side: str  # "predicted" | "measured"
    size_bytes: int  # of one block
    count: int
    category: str  # predicted side only
    names: tuple[str, ...]  # labels, or lines of code; the candidates among which the surplus is

    @property
    def total_bytes(self) -> int:
        return self.size_bytes * self.count


def diff_blocks(predicted: Sequence[Live], measured: Sequence[HistoryBlock]) -> list[Leftover]:
    """What does not cancel, largest first."""
    ours, theirs = Counter(p.tensor_bytes for p in predicted), Counter(m.request_bytes for m in measured)
    labels: dict[int, Counter[str]] = defaultdict(Counter)
    categories: dict[int, Counter[str]] = defaultdict(Counter)
    lines: dict[int, Counter[str]] = defaultdict(Counter)
    for p in predicted:
        labels[p.tensor_bytes][p.label] += 1
        categories[p.tensor_bytes][p.category.value] += 1
    for m in measured:
        lines[m.request_bytes][m.where or "backward pass or before the recording"] += 1
    out = [
        Leftover("predicted", size, n, _most(categories[size], 1)[0], _most(labels[size]))
        for size, n in (ours - theirs).items()
    ]
    out += [Leftover("measured", size, n, "", _most(lines[size])) for size, n in (theirs - ours).items()]
    return sorted(out, key=lambda left: -left.total_bytes)


def _most(names: Counter[str], limit: int = 3) -> tuple[str, ...]:
    return tuple(f"{name} ({n})" if limit > 1 else name for name, n in names.most_common(limit))


def total_bytes(blocks: Iterable[HistoryBlock]) -> int:
    return sum(b.request_bytes for b in blocks)
