"""Events of replayed steps -> memory per category at every phase's end and peak."""

from __future__ import annotations

from collections.abc import Sequence

from lab.analytic.tape import ALLOC, FREE, MARK, MOVE, Event
from lab.record import Moment, PhasePrediction
from lab.vocab import STEP_PHASES, MemoryBreakdown, MemoryCategory, StepPhase

Spans = list[tuple[StepPhase, int, int]]
"""(phase, first event index, index after the last event); micro-steps give several spans of one phase."""


def phase_mark(step: int, phase: StepPhase, end: bool) -> str:
    return f"{step}/{phase}/{'end' if end else 'start'}"


def spans_of(events: Sequence[Event], step: int) -> Spans:
    """Event ranges of one step's phases, from its marks."""
    spans: Spans = []
    start = 0
    for i, event in enumerate(events):
        if event[0] == MARK:
            owner, phase, edge = event[3].split("/")
            if int(owner) == step:
                if edge == "start":
                    start = i
                else:
                    spans.append((StepPhase(phase), start, i))
    return spans


def totals(events: Sequence[Event], sizes: Sequence[int] | None = None) -> list[int]:
    """Allocated bytes after each event. ``sizes`` overrides a storage's bytes by id (the allocator's blocks)."""
    live: dict[int, int] = {}
    out, total = [], 0
    for kind, ident, nbytes, _, _, _ in events:
        if kind == ALLOC:
            size = nbytes if sizes is None else sizes[ident]
            live[ident] = size
            total += size
        elif kind == FREE:
            total -= live.pop(ident)
        out.append(total)
    return out


def categories_at(events: Sequence[Event], indices: Sequence[int], sizes: Sequence[int] | None = None) -> list[Moment]:
    """Bytes by category after the events at ``indices`` (ascending)."""
    live: dict[int, tuple[int, str]] = {}
    sums: dict[str, int] = dict.fromkeys(MemoryCategory, 0)
    moments: list[Moment] = []
    wanted = iter(indices)
    target = next(wanted, None)
    for i, (kind, ident, nbytes, category, _, _) in enumerate(events):
        if kind == ALLOC:
            size = nbytes if sizes is None else sizes[ident]
            live[ident] = (size, category)
            sums[category] += size
        elif kind == FREE:
            size, old = live.pop(ident)
            sums[old] -= size
        elif kind == MOVE:
            size, old = live[ident]
            live[ident] = (size, category)
            sums[old] -= size
            sums[category] += size
        while target == i:
            breakdown = MemoryBreakdown.of(sums)
            moments.append(Moment(breakdown.total_bytes, breakdown))
            target = next(wanted, None)
    return moments


def phases(events: Sequence[Event], step: int, sizes: Sequence[int] | None = None) -> dict[StepPhase, PhasePrediction]:
    """Peak and end of every phase of one step; micro-steps: the highest peak, the last end."""
    curve = totals(events, sizes)
    peaks: dict[StepPhase, int] = {}
    ends: dict[StepPhase, int] = {}
    for phase, first, last in spans_of(events, step):
        # The counter's peak is reset to what is allocated at the phase's start: the start counts too.
        best = max(range(first, last + 1), key=curve.__getitem__)
        if phase not in peaks or curve[best] > curve[peaks[phase]]:
            peaks[phase] = best
        ends[phase] = last
    order = sorted({*peaks.values(), *ends.values()})
    at = dict(zip(order, categories_at(events, order, sizes), strict=True))
    return {p: PhasePrediction(end=at[ends[p]], peak=at[peaks[p]]) for p in STEP_PHASES if p in peaks}
