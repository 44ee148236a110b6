"""A recorded block's hooks with the events that they make, kept for where they make the same ones again.

Where a strategy says that the hooks inside a block will do to memory what they did before (``Rule.hooks_repeat``), the
events of a run of hooks and of the block's own between them are one segment. What else the hooks keep account of, the
strategy does for all of them when the pass is over (``Rule.count_hooks``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lab.analytic.layer_instructions import Hook, Instruction, Pass, Play, Rounds
from lab.analytic.segments import Segment, spelled_out
from lab.analytic.tape import ALLOC, FREE, Event, Trace


class RoundRecorder:
    """Listens while a block's instructions are carried out; afterwards ``rounds`` has them with hooks in rounds.

    The block's own ``num_storages`` are numbered from ``first``; those that hooks make get the numbers from ``spare``
    on, ``num_spare`` of them. ``rounds`` is None if hooks leave something behind or free what is not theirs.
    """

    def __init__(self, trace: Trace, module: str, first: int, num_storages: int, spare: int, num_spare: int) -> None:
        self.trace, self.module, self.first, self.num_storages = trace, module, first, num_storages
        self.spare, self.num_spare = spare, num_spare
        self.numbers: dict[int, int] = {}  # of storages that hooks made
        self.alive: set[int] = set()
        self.possible = True
        self.out = Rounds([], [])

    def listen(self, instructions: Sequence[Instruction], run: Callable[[Sequence[Instruction]], None]) -> None:
        """Carry the instructions out with ``run``."""
        begin, group = 0, list[Play | Hook | Pass]()
        for step in (*instructions, None):
            if isinstance(step, Play | Hook | Pass):
                if not group:
                    begin = len(self.trace.events)
                group.append(step)
                run([step])
                continue
            if group:
                self.out.hooks += [s for s in group if not isinstance(s, Play)]
                if events := self._renumbered(begin):
                    self.out.steps.append(Play(Segment(events, self.module)))
                group = []
            if step is not None:
                self.out.steps.append(step)
                run([step])

    @property
    def rounds(self) -> Rounds | None:
        return self.out if self.possible and not self.alive else None

    def _renumbered(self, begin: int) -> list[Event]:
        out: list[Event] = []
        for kind, ident, nbytes, category, label, stream in spelled_out(self.trace.events[begin:], self.trace.segments):
            number = ident - self.first
            if not 0 <= number < self.num_storages:
                if kind == ALLOC:
                    self.numbers[ident] = self.spare + len(self.numbers)
                    self.alive.add(ident)
                elif kind == FREE:
                    self.alive.discard(ident)
                if ident not in self.numbers or len(self.numbers) > self.num_spare:
                    self.possible = False
                    return []
                number = self.numbers[ident]
            out.append((kind, number, nbytes, category, label, stream))
        return out
