"""What ZeRO's stages 1 and 2 do differently on each rank: its partition of the gradients, and the events of that.

All ranks make, bucket and reduce the same gradients. What each keeps of them is its own, so several ranks can be
replayed together: one replay for what they have in common, and beside it for each what it does alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lab.analytic.architecture import ParameterSpec
from lab.analytic.segments import Repeated
from lab.analytic.sharding.zero_partitions import FlatGroup
from lab.analytic.tape import Event, Tape, Tensor, Trace
from lab.vocab import MemoryCategory

FP64 = 8  # bytes; zero/utils.py, get_norm_dtype
GRADIENTS, TEMPORARIES = MemoryCategory.GRADIENTS, MemoryCategory.TEMPORARIES


class _Placed(list[Event]):
    """Events, each with the number of common ones before it."""

    def __init__(self, common: list[Event]) -> None:
        super().__init__()
        self.common = common
        self.places: list[int] = []

    def append(self, event: Event) -> None:
        self.places.append(len(self.common))
        super().append(event)

    def extend(self, events: Iterable[Event]) -> None:
        for event in events:
            self.append(event)


class RankTrace(Trace):
    """What one rank does alone, beside a trace of what it has in common with others."""

    __slots__ = ("common", "placed")

    def __init__(self, common: Trace) -> None:
        self.common = common
        self.alignment, self.on_device_kernels = common.alignment, common.on_device_kernels
        self.shorthand, self.segments = common.shorthand, common.segments
        self.events = self.placed = _Placed(common.events)

    @property
    def next_id(self) -> int:
        return self.common.next_id

    @next_id.setter
    def next_id(self, ident: int) -> None:
        self.common.next_id = ident

    @property
    def stream(self) -> int:
        return self.common.stream

    @stream.setter
    def stream(self, stream: int) -> None:
        self.common.stream = stream

    def whole(self) -> list[Event]:
        """All that the rank does, in order."""
        common, out, done = self.common.events, list[Event](), 0
        for place, event in zip(self.placed.places, self.placed, strict=True):
            out += common[done:place]
            out.append(event)
            done = place
        return out + common[done:]


class Partition:
    """One rank's share of the gradients (averaged_gradients). ``tape``: of what the rank does alone."""

    def __init__(self, tape: Tape, group: FlatGroup, rank: int, itemsize: int) -> None:
        self.tape, self.itemsize, self.numel = tape, itemsize, group.partition_numel
        self.members, self.slices = group.members(rank), group.slices(rank)
        self.own = {s.name for s in self.members}
        self.buffer: Tensor | None = None  # grads_in_partition
        self.copied: list[Tensor] = []  # views of it
        self.accumulated: list[Tensor] | None = None  # all_grad_tensors
        self.averaged: list[Tensor] = []
        self.norms = Repeated(tape.trace, self._norms)

    def copy(self, spec: ParameterSpec) -> None:
        """copy_grads_in_partition: the first own gradient makes room for all of them."""
        if self.buffer is None:
            numel = sum([s.numel for s in self.members])
            self.buffer = self.tape.new(numel, self.itemsize, "grads_in_partition", GRADIENTS)
        self.copied.append(self.buffer.view(spec.numel))

    def accumulate(self, gradients: Sequence[Tensor], last_micro_step: bool) -> None:
        """get_flat_partition's tensors: the first micro-step's, to which later ones are added in place."""
        if self.accumulated is None:
            self.accumulated = [g.view() for g in gradients]
        if last_micro_step:
            self.averaged, self.accumulated = self.accumulated, None
            padding = self.numel - sum(self.slices)
            if padding:
                self.averaged.append(self.tape.new(padding, self.itemsize, "partition padding", GRADIENTS))

    def _norms(self, trace: Trace) -> list[Event]:
        """get_grad_norm_direct; without clipping, too. The norms stay until the last is there."""
        norms: list[Event] = []
        for part in self.slices:
            wide = trace.allocate(part * FP64, TEMPORARIES, "gradient slice, fp64")
            norms.append(trace.allocate(FP64, TEMPORARIES, "gradient norm"))
            trace.free(wide)
        while norms:
            trace.free(norms.pop())
        return []

    def flattened(self) -> Tensor:
        """Flattening copies unless the partition is one piece."""
        if len(self.averaged) == 1:
            return self.averaged[0]
        return self.tape.new(self.numel, self.itemsize, "flat gradient partition", GRADIENTS)
