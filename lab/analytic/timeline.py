"""Events of replayed steps -> memory per category at every phase's end and peak."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import itemgetter

from lab.analytic.segments import Segment, running_totals
from lab.analytic.tape import ALLOC, FREE, MARK, MOVE, SEGMENT, Event
from lab.record import Moment, PhasePrediction
from lab.vocab import STEP_PHASES, MemoryBreakdown, MemoryCategory, StepPhase

_KIND = itemgetter(0)
Spans = list[tuple[StepPhase, int, int]]
"""(phase, first event index, index after the last event); micro-steps give several spans of one phase."""


def phase_mark(step: int, phase: StepPhase, end: bool) -> str:
    return f"{step}/{phase}/{'end' if end else 'start'}"


def spans_of(events: Sequence[Event], step: int) -> Spans:
    """Event ranges of one step's phases, from its marks."""
    return _spans(events).get(step, [])


def _spans(events: Sequence[Event]) -> dict[int, Spans]:
    spans: dict[int, Spans] = {}
    start = 0
    for i in _marks(events):
        owner, phase, edge = events[i][3].split("/")
        if edge == "start":
            start = i
        else:
            spans.setdefault(int(owner), []).append((StepPhase(phase), start, i))
    return spans


def totals(events: Sequence[Event], sizes: Sequence[int] | None = None) -> list[int]:
    """Allocated bytes after each event. ``sizes`` overrides a storage's bytes by id (the allocator's blocks)."""
    if sizes is None:
        return running_totals(events)
    out, total = [], 0
    for kind, ident, _, _, _, _ in events:
        if kind == ALLOC:
            total += sizes[ident]
        elif kind == FREE:
            total -= sizes[ident]
        out.append(total)
    return out


def phases(events: Sequence[Event], step: int, sizes: Sequence[int] | None = None) -> dict[StepPhase, PhasePrediction]:
    """Peak and end of every phase of one step; micro-steps: the highest peak, the last end."""
    return Timeline(events, sizes=sizes).read([step])[0][0]


class Timeline:
    """The running total over a list of events, made in one pass, and what it consists of at chosen moments.

    ``segments``: the trace's, where events name some (``lab.analytic.tape.SEGMENT``); a segment is one entry, with its
    highest total inside. ``sizes``: bytes by storage id, in place of the events' own; ``curve``: the total after each
    event, if it is known. Both only without segments.
    """

    def __init__(
        self,
        events: Sequence[Event],
        segments: Sequence[Segment] = (),
        sizes: Sequence[int] | None = None,
        curve: Sequence[int] | None = None,
    ) -> None:
        self.events, self.segments, self.sizes = events, segments, sizes
        self.high: Sequence[int]  # the highest total during each event
        if segments:
            self.high = _highest_with_segments(events, segments)
        else:
            self.high = totals(events, sizes) if curve is None else curve
        self.spans = _spans(events)

    def read(
        self, steps: Sequence[int], also: Sequence[int] = ()
    ) -> tuple[list[dict[StepPhase, PhasePrediction]], list[Moment]]:
        """Peak and end of every phase of each step (micro-steps: the highest peak, the last end); moments ``also``."""
        high = self.high
        found: list[tuple[dict[StepPhase, int], dict[StepPhase, int]]] = []
        for step in steps:
            peaks: dict[StepPhase, int] = {}
            ends: dict[StepPhase, int] = {}
            for phase, first, last in self.spans.get(step, []):
                # The counter's peak is reset to what is allocated at the phase's start: the start counts too.
                best = high.index(max(high[first : last + 1]), first)
                if phase not in peaks or high[best] > high[peaks[phase]]:
                    peaks[phase] = best
                ends[phase] = last
            found.append((peaks, ends))
        wanted = sorted({*also, *(i for peaks, ends in found for i in (*peaks.values(), *ends.values()))})
        at = dict(zip(wanted, self.moments(wanted), strict=True))
        by_step = [
            {p: PhasePrediction(end=at[ends[p]], peak=at[peaks[p]]) for p in STEP_PHASES if p in peaks}
            for peaks, ends in found
        ]
        return by_step, [at[i] for i in also]

    def moments(self, indices: Iterable[int]) -> list[Moment]:
        """Bytes by category after the events at ``indices`` (ascending); of a segment, where its total is highest."""
        sizes, sums = self.sizes, dict.fromkeys(MemoryCategory, 0)
        by_name: dict[str, int] = sums  # type: ignore[assignment]  # categories are strings
        moments: list[Moment] = []
        done = 0
        for index in indices:
            played = [0] * len(self.segments)  # times
            for kind, ident, size, category, label, _ in self.events[done : index + 1]:
                if kind == SEGMENT:
                    played[size] += 1
                    continue
                if sizes is not None and ident >= 0:
                    size = sizes[ident]
                if kind == ALLOC:
                    by_name[category] += size
                elif kind == FREE:
                    by_name[category] -= size
                elif kind == MOVE:
                    by_name[label] -= size
                    by_name[category] += size
            for segment, times in zip(self.segments, played, strict=True):
                if times:
                    for name, change in segment.changes:
                        by_name[name] += times * change
            done = index + 1
            at = sums
            if self.events and self.events[index][0] == SEGMENT:
                segment = self.segments[self.events[index][2]]
                at = dict(sums)
                for name, change in segment.changes_since_highest:
                    at[MemoryCategory(name)] -= change
            breakdown = MemoryBreakdown(at)
            moments.append(Moment(breakdown.total_bytes, breakdown))
        return moments


def _highest_with_segments(events: Sequence[Event], segments: Sequence[Segment]) -> list[int]:
    sums = [s.total_and_highest for s in segments]
    whole, highest = [total for total, _ in sums], [high for _, high in sums]
    changes = [
        whole[n] if kind == SEGMENT else n if kind == ALLOC else -n if kind == FREE else 0
        for kind, _, n, _, _, _ in events
    ]
    high = list(accumulate(changes))
    for i, event in enumerate(events):
        if event[0] == SEGMENT:
            high[i] += highest[event[2]] - whole[event[2]]
    return high


def _marks(events: Sequence[Event]) -> list[int]:
    """Indices of the marks, which are few."""
    kinds = bytes(map(_KIND, events))
    found = [kinds.find(MARK)]
    while found[-1] >= 0:
        found.append(kinds.find(MARK, found[-1] + 1))
    return found[:-1]
