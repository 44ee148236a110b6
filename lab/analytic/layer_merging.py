"""A recorded backward with the arrival of its gradients among its events, for strategies that do nothing at it.

``Accumulator`` takes a parameter's first gradient over and adds later ones in place. Where the strategy's
``grad_ready`` is quiet (``Rule.quiet_gradients``), that is one event or two each, so the events before and after are
one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lab.analytic.layer_instructions import Gradient, Instruction, Play, Recording, Value
from lab.analytic.segments import Segment
from lab.analytic.sharding.base import PASSED_ON
from lab.analytic.tape import FREE, MOVE, Event
from lab.vocab import MemoryCategory

GRADIENTS = MemoryCategory.GRADIENTS
FIRST, LATER = "first", "later"  # of KEPT gradients; or PASSED_ON


def merged_backward(recording: Recording, arrival: str) -> list[Instruction]:
    """The backward's instructions without ``Gradient``, which becomes what the gradient's arrival does."""
    out: list[Instruction] = []
    pending: list[Event] = []

    def flush() -> None:
        if pending:
            out.append(Play(Segment(pending, recording.module)))
            pending.clear()

    for step in recording.backward:
        if isinstance(step, Play):
            pending += step.segment.events
        elif isinstance(step, Gradient):
            pending += _arrival(step.value, arrival)
        else:
            flush()
            out.append(step)
    flush()
    return out


def quiet_arrivals(recording: Recording) -> dict[str, Play]:
    """What each gradient's arrival does, by parameter, where it is PASSED_ON."""
    arriving = [s for s in recording.backward if isinstance(s, Gradient)]
    return {s.parameter: Play(Segment(_arrival(s.value, PASSED_ON), recording.module)) for s in arriving}


def gradients_of(backward: Sequence[Instruction]) -> list[tuple[str, Value]]:
    """(parameter, its gradient once it counts as one), in the order of their arrival."""
    return [(s.parameter, replace(s.value, category=GRADIENTS)) for s in backward if isinstance(s, Gradient)]


def _arrival(value: Value, arrival: str) -> list[Event]:
    """FIRST: it counts as a gradient from here on. LATER: added to one that is there. PASSED_ON: counted, given up."""
    size = value.size
    if arrival == LATER:
        return [(FREE, value.ident, size, value.category, value.label, 0)]
    events: list[Event] = []
    if value.category is not GRADIENTS:
        events.append((MOVE, value.ident, size, GRADIENTS, value.category, 0))
    if arrival == PASSED_ON:
        events.append((FREE, value.ident, size, GRADIENTS, value.label, 0))
    return events
