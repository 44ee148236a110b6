"""How a sharded model gets its first values under FSDP2: parallel/fsdp.py, _initialise_shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from lab.analytic.segments import Segment
from lab.analytic.tape import FP32, Event, Trace
from lab.vocab import MemoryCategory

PASSING = MemoryCategory.TEMPORARIES


class Initialised:
    """One unit's parameters: each whole one is drawn in fp32 (and cast), then cut. Units of one kind do the same.

    Value and shard are variables of one loop over all parameters, and live until the next one's are there. So a unit
    lets go of what the one before has left, in the middle of its own first parameter's events.

    ``sizes``: (name, elements, elements of the padded shard, bytes per element).
    """

    def __init__(self, of: Trace, sizes: Iterable[tuple[str, int, int, int]], block: str) -> None:
        trace, self.block = Trace(of.alignment, of.on_device_kernels), block
        self.left: list[Event] = []  # value and shard of the last parameter
        cuts: list[int] = []  # where what the unit before has left goes
        for name, numel, padded, itemsize in sizes:
            value = trace.allocate(numel * FP32, PASSING, f"initial {name}")
            if itemsize != FP32:
                cast = trace.allocate(numel * itemsize, PASSING, f"initial {name}")
                trace.free(value)
                value = cast
            self._let_go(trace, cuts, 0)
            shard = trace.allocate(padded * itemsize, PASSING, f"initial shard of {name}")
            self._let_go(trace, cuts, 1)
            self.left = [value, shard]
        events, self.num_storages = trace.events, trace.next_id
        self.parts = [Segment(events[a:b], block) for a, b in pairwise([0, *cuts, len(events)])]

    def _let_go(self, trace: Trace, cuts: list[int], which: int) -> None:
        if self.left:
            trace.free(self.left[which])
        else:
            cuts.append(len(trace.events))

    def play(self, trace: Trace, block: str, before: Sequence[Event]) -> list[Event]:
        """``before``: what the unit before has left. Returns what this one leaves."""
        first = trace.next_id
        trace.next_id = first + self.num_storages
        for part, event in zip(self.parts, (*before, None, None, None), strict=False):
            part.play(trace, first, block)
            if event is not None:
                trace.free(event)
        return [
            (kind, first + ident, nbytes, category, label.replace(f"{self.block}.", f"{block}."), stream)
            for kind, ident, nbytes, category, label, stream in self.left
        ]
