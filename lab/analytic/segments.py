"""Runs of events that repeat from layer to layer: kept once, referred to by one event, spelled out when asked for.

A segment's events name storages from 0; the event that stands for it carries the first storage's id and the module that
ran. So it is a shorthand for a list of events, not a summary: ``spelled_out`` gives the list, event by event.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from lab.analytic.tape import ALLOC, FREE, MOVE, SEGMENT, Event


class Segment:
    """Allocating, freeing and moving, in order. ``module``: in which this was recorded; it begins some labels."""

    def __init__(self, events: Sequence[Event], module: str) -> None:
        self.events, self.module = tuple(events), module
        self._labels: dict[str, list[str]] = {}

    @cached_property
    def _running(self) -> list[int]:
        out, total = [], 0
        for kind, _, nbytes, _, _, _ in self.events:
            total += nbytes if kind == ALLOC else -nbytes if kind == FREE else 0
            out.append(total)
        return out

    @cached_property
    def change(self) -> int:
        """Bytes that the whole segment adds."""
        return self._running[-1]

    @cached_property
    def highest(self) -> int:
        """Bytes added when most are, after one event or more."""
        return max(self._running)

    @cached_property
    def changes(self) -> tuple[tuple[str, int], ...]:
        """Bytes that the whole segment adds, by category."""
        return _changes(self.events)

    @cached_property
    def changes_since_highest(self) -> tuple[tuple[str, int], ...]:
        """Bytes by category that are added after the first moment at which most are."""
        return _changes(self.events[self._running.index(self.highest) + 1 :])

    def labels(self, module: str) -> list[str]:
        """The events' labels when ``module`` runs them."""
        if module not in self._labels:
            own = self.module
            self._labels[module] = [e[4].replace(own + ".", module + ".") for e in self.events]
        return self._labels[module]


def _changes(events: Sequence[Event]) -> tuple[tuple[str, int], ...]:
    sums: dict[str, int] = {}
    for kind, _, nbytes, category, label, _ in events:
        if kind == ALLOC:
            sums[category] = sums.get(category, 0) + nbytes
        elif kind == FREE:
            sums[category] = sums.get(category, 0) - nbytes
        elif kind == MOVE:
            sums[category] = sums.get(category, 0) + nbytes
            sums[label] = sums.get(label, 0) - nbytes
    return tuple((category, change) for category, change in sums.items() if change)


def spelled_out(events: Sequence[Event], segments: Sequence[Segment]) -> list[Event]:
    """The same list without shorthand."""
    out: list[Event] = []
    for event in events:
        if event[0] != SEGMENT:
            out.append(event)
            continue
        _, first, index, module, _, _ = event
        segment = segments[index]
        out += [
            (kind, first + ident, nbytes, category, label, stream)
            for (kind, ident, nbytes, category, _, stream), label in zip(
                segment.events, segment.labels(module), strict=True
            )
        ]
    return out
