"""Runs of events that repeat from layer to layer: kept once, referred to by one event, spelled out when asked for.

A segment's events name storages from 0; the event that stands for it carries the first storage's id and the module that
ran. So it is a shorthand for a list of events, not a summary: ``spelled_out`` gives the list, event by event.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from lab.analytic.tape import ALLOC, FREE, MOVE, SEGMENT, Event, Storage, Trace, aligned


class Segment:
    """Allocating, freeing and moving, in order. ``module``: in which this was recorded; it begins some labels."""

    def __init__(self, events: Sequence[Event], module: str) -> None:
        self.events, self.module = tuple(events), module
        self.place = -1  # in the trace's list
        self._labels: dict[str, list[str]] = {}
        self._running: list[int] = []
        self._total_and_highest: tuple[int, int] | None = None

    def put(self, trace: Trace) -> int:
        """Its index in the trace's list, where it is from now on."""
        if self.place < 0:
            self.place = len(trace.segments)
            trace.segments.append(self)
        return self.place

    def play(self, trace: Trace, first: int, module: str) -> None:
        """Once more, in ``trace``, by ``module``, with storages from ``first`` on."""
        if not self.events:
            return
        event: Event = (SEGMENT, first, self.put(trace), module, "", 0)
        if trace.shorthand:
            trace.events.append(event)
        else:
            trace.events.extend(spelled_out([event], trace.segments))

    @property
    def running(self) -> list[int]:
        """Bytes added after each event."""
        if not self._running:
            self._running = running_totals(self.events)
        return self._running

    @property
    def total_and_highest(self) -> tuple[int, int]:
        """Bytes added by all of it, and when most are."""
        if self._total_and_highest is None:
            self._total_and_highest = self.running[-1], max(self.running)
        return self._total_and_highest

    @cached_property
    def changes(self) -> tuple[tuple[str, int], ...]:
        """Bytes that the whole segment adds, by category."""
        return _changes(self.events)

    @cached_property
    def changes_since_highest(self) -> tuple[tuple[str, int], ...]:
        """Bytes by category that are added after the first moment at which most are."""
        running = self.running
        return _changes(self.events[running.index(max(running)) + 1 :])

    def labels(self, module: str) -> list[str]:
        """The events' labels when ``module`` runs them."""
        if module not in self._labels:
            own = self.module
            self._labels[module] = [e[4].replace(own + ".", module + ".") for e in self.events]
        return self._labels[module]


def running_totals(events: Sequence[Event]) -> list[int]:
    """Bytes added after each event; none of which is a segment."""
    return list(accumulate([n if kind == ALLOC else -n if kind == FREE else 0 for kind, _, n, _, _, _ in events]))


Pairs = dict[Hashable, tuple[Segment, Segment]]
"""Segments that take and give back, by what they take."""


class Together:
    """Storages that are taken and given back together (``Storage.resize``): one segment for either.

    ``kinds``: segments by what the storages are like, shared by those who have the same under other modules' names.
    """

    def __init__(self, storages: Sequence[Storage], module: str, kinds: Pairs) -> None:
        self.storages, self.module = storages, module
        trace = storages[0].trace
        for storage in storages:
            storage.size = aligned(storage.nbytes, trace.alignment)
        kind = tuple((s.size, s.category, s.label.replace(f"{module}.", "", 1)) for s in storages)
        if kind not in kinds:
            taken: list[Event] = [(ALLOC, k, s.size, s.category, s.label, 0) for k, s in enumerate(storages)]
            freed: list[Event] = [(FREE, k, s.size, s.category, s.label, 0) for k, s in enumerate(storages)]
            kinds[kind] = Segment(taken, module), Segment(freed, module)
        self.taken, self.freed = kinds[kind]

    def resize(self, live: bool) -> None:
        """All of them, none of which is ``live`` yet; on stream 0."""
        storages = self.storages
        trace = storages[0].trace
        if not trace.shorthand:
            for storage in storages:
                storage.resize(live)
            return
        if live:
            ident = trace.next_id
            for storage in storages:
                storage.id = ident
                ident += 1
            trace.next_id = ident
        for storage in storages:
            storage.live = live
        segment = self.taken if live else self.freed
        trace.events.append((SEGMENT, storages[0].id, segment.put(trace), self.module, "", 0))


class Repeated:
    """What ``run`` does to a trace like ``of``, in ``module``: a segment, to be played again by others like it.

    ``run`` returns what it has allocated and may be given back later, all at once and the last first.
    """

    def __init__(self, of: Trace, run: Callable[[Trace], list[Event]], module: str = "") -> None:
        trace = Trace(of.alignment, of.on_device_kernels)
        kept = run(trace)
        self.done, self.num_storages = Segment(trace.events, module), trace.next_id
        trace.events = []
        for event in reversed(kept):
            trace.free(event)
        self.given_back = Segment(trace.events, module)

    def play(self, trace: Trace, module: str = "") -> Played:
        """Once more, in ``trace``, by ``module``."""
        first = trace.next_id
        trace.next_id = first + self.num_storages
        self.done.play(trace, first, module)
        return Played(self, first, module)


class Played(NamedTuple):
    """One time that it was played."""

    what: Repeated
    first: int  # of its storages
    module: str

    def give_back(self, trace: Trace) -> None:
        """All that it has left."""
        self.what.given_back.play(trace, self.first, self.module)


def _changes(events: Sequence[Event]) -> tuple[tuple[str, int], ...]:
    sums: defaultdict[str, int] = defaultdict(int)
    for kind, _, nbytes, category, label, _ in events:
        if kind == ALLOC:
            sums[category] += nbytes
        elif kind == FREE:
            sums[category] -= nbytes
        elif kind == MOVE:
            sums[category] += nbytes
            sums[label] -= nbytes
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
