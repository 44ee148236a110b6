"""ZeRO-3's whole parameters: which buffers an all-gather takes, and what becomes the parameter.

Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py; method names are DeepSpeed's where there is one.
N = world_size, e = bytes per parameter element, shard = ceil(numel / N).

- One parameter: a buffer of e * N * shard, which becomes the parameter (``_all_gather_sequential``).
- Several: one flat buffer of the sum of those (``all_gather_coalesced``), then, when the first of them is waited
  for, a copy of e * numel per parameter (``AllGatherCoalescedHandle.wait``). The flat buffer lives until the last of
  them has been waited for: each parameter in flight holds the handle.
- One rank: nothing is gathered, the shard is the parameter (``NoGatherCoalescedHandle``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter

from lab.analytic.ops import Parameter
from lab.analytic.tape import Tape, Tensor
from lab.vocab import MemoryCategory

GATHERED, COMM = MemoryCategory.GATHERED_PARAMETERS, MemoryCategory.COMM_BUFFERS
NOT_AVAILABLE, INFLIGHT, AVAILABLE = "not available", "in flight", "available"  # ZeroParamStatus


@dataclass(eq=False)
class Sharded:
    """One parameter: ``index`` is ds_id, ``shard_numel`` the padded share of a rank (partition_numel)."""

    parameter: Parameter
    index: int
    shard_numel: int
    persist: bool
    status: str = NOT_AVAILABLE
    active: set[str] = field(default_factory=set)  # ds_active_sub_modules
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.numel = self.parameter.numel


_index = attrgetter("index")


@dataclass
class Handle:
    """An all-gather under way; ``flat`` is what it fills when several parameters share it."""

    params: list[Sharded]
    flat: Tensor | None = None
    complete: bool = False


class Gatherer:
    """``stream``: the all-gather stream (overlap_comm, on by default for stage 3), 0 where there is none."""

    def __init__(self, tape: Tape, world: int, stream: int) -> None:
        self.tape, self.world, self.stream = tape, world, stream
        self.inflight: dict[Sharded, Handle] = {}
        self.empty = tape.new(0, 1, "").storage

    def _whole(self, p: Sharded, padded: bool) -> Tensor:
        size = p.parameter.tensor.itemsize
        numel = p.shard_numel * self.world if padded else p.numel
        storage = self.tape.new(numel, size, f"gathered {p.parameter.name}", GATHERED).storage
        return Tensor(storage, p.numel, size)

    def all_gather(self, params: list[Sharded]) -> None:
        """Blocking (Init._all_gather), on the current stream: one padded buffer per parameter, which it becomes."""
        for p in params:
            if p.status == NOT_AVAILABLE:
                if self.world > 1:
                    p.parameter.tensor = self._whole(p, padded=True)
                p.status = AVAILABLE

    def start(self, params: list[Sharded]) -> int:
        """Start one all-gather of those that are not there; the elements it fetches."""
        params = [p for p in params if p.status == NOT_AVAILABLE]
        if not params:
            return 0
        params.sort(key=_index)
        handle = Handle(params)
        self.tape.trace.stream = self.stream
        if self.world > 1 and len(params) == 1:
            params[0].parameter.tensor = self._whole(params[0], padded=True)
        elif self.world > 1:
            size = params[0].parameter.tensor.itemsize
            padded = sum(p.shard_numel for p in params) * self.world
            handle.flat = self.tape.new(padded, size, "ZeRO-3 all-gather", COMM)
        self.tape.trace.stream = 0
        for p in params:
            p.status = INFLIGHT
            self.inflight[p] = handle
        return sum(p.numel for p in params)

    def wait(self, p: Sharded) -> None:
        """Make a parameter in flight available, and with it all that its all-gather brings."""
        handle = self.inflight.pop(p)
        if handle.complete:
            return
        self.tape.trace.stream = self.stream
        for q in handle.params:
            if handle.flat is not None:
                q.parameter.tensor = self._whole(q, padded=False)
            q.status = AVAILABLE
        self.tape.trace.stream = 0
        handle.complete = True

    def partition(self, p: Sharded) -> None:
        """free_param: ``data`` becomes an empty tensor."""
        size = p.parameter.tensor.itemsize
        p.parameter.tensor = Tensor(self.empty, p.numel, size)
        p.status = NOT_AVAILABLE
