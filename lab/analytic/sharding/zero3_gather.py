"""ZeRO-3's whole parameters: which buffers an all-gather takes, and what becomes the parameter.

Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py; method names are DeepSpeed's where there is one.
N = world_size, e = bytes per parameter element, shard = ceil(numel / N).

- One parameter: a buffer of e * N * shard, which becomes the parameter (``_all_gather_sequential``).
- Several: one flat buffer of the sum of those (``all_gather_coalesced``), then, when the first of them is waited
  for, a copy of e * numel per parameter (``AllGatherCoalescedHandle.wait``). The flat buffer lives until the last of
  them has been waited for: each parameter in flight holds the handle.
- One rank: nothing is gathered, the shard is the parameter (``NoGatherCoalescedHandle``). Only a blocking all-gather of
  one parameter takes its buffer whatever the number of ranks (``_allgather_params_sequential``).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import partial
from itertools import groupby
from operator import attrgetter

from lab.analytic.ops import Parameter
from lab.analytic.segments import Repeated
from lab.analytic.tape import Event, Storage, Tape, Tensor, Trace
from lab.vocab import MemoryCategory

GATHERED, COMM = MemoryCategory.GATHERED_PARAMETERS, MemoryCategory.COMM_BUFFERS
NOT_AVAILABLE, INFLIGHT, AVAILABLE = "not available", "in flight", "available"  # ZeroParamStatus
NEVER = -(10**10)


class Sharded:
    """One parameter: ``index`` is ds_id, ``shard_numel`` the padded share of a rank (partition_numel).

    ``block``: the module that is repeated from layer to layer and holds it; "" for the root's.
    """

    __slots__ = (
        *(
            "absent",
            "active",
            "block",
            "fetched_for",
            "index",
            "itemsize",
            "label",
            "name",
            "numel",
            "parameter",
            "persist",
        ),
        *("shard_numel", "status", "uses"),
    )

    def __init__(self, parameter: Parameter, index: int, shard_numel: int, persist: bool, block: str = "") -> None:
        self.parameter, self.index, self.shard_numel, self.persist = parameter, index, shard_numel, persist
        self.block = block
        self.name, self.numel, self.itemsize = parameter.name, parameter.numel, parameter.tensor.itemsize
        self.label = f"gathered {parameter.name}"
        self.absent = parameter.tensor  # as it is now: empty
        self.status = NOT_AVAILABLE
        self.active: set[object] = set()  # ds_active_sub_modules
        self.fetched_for = NEVER  # most_recent_step_id_param_fetched_for
        self.uses: list[int] = []  # the places in the order of modules that use it


by_ds_id, _block = attrgetter("index"), attrgetter("block")


def by_block(params: Iterable[Sharded]) -> list[list[Sharded]]:
    """The same, cut where a block begins or ends."""
    return [list(group) for _, group in groupby(params, key=_block)]


class Handle:
    """An all-gather under way; ``flat`` is what it fills when several parameters share it."""

    __slots__ = ("complete", "flat", "params")

    def __init__(self, params: list[Sharded]) -> None:
        self.params, self.complete = params, False
        self.flat: Tensor | None = None


class Gatherer:
    """``stream``: the all-gather stream (overlap_comm, on by default for stage 3), 0 where there is none."""

    def __init__(self, tape: Tape, world: int, stream: int) -> None:
        self.tape, self.world, self.stream = tape, world, stream
        self.inflight: dict[Sharded, Handle] = {}

    def _make_whole(self, p: Sharded, padded: bool) -> None:
        nbytes = (p.shard_numel * self.world if padded else p.numel) * p.itemsize
        p.parameter.tensor = Tensor(Storage(self.tape.trace, nbytes, GATHERED, p.label), p.numel, p.itemsize)

    def visit(self, params: Iterable[Sharded]) -> None:
        """Each gathered by itself and given up at once; blocks that are alike do the same."""
        trace, kinds = self.tape.trace, dict[Hashable, Repeated]()
        for group in by_block(params):
            block = group[0].block
            kind = tuple([(p.name[len(block) :], p.shard_numel) for p in group])
            if kind not in kinds:
                kinds[kind] = Repeated(trace, partial(self._visit, group), block)
            kinds[kind].play(trace, block)

    def _visit(self, params: Iterable[Sharded], trace: Trace) -> list[Event]:
        for p in params:
            trace.free(trace.allocate(p.shard_numel * self.world * p.itemsize, GATHERED, p.label))
        return []

    def all_gather(self, params: list[Sharded]) -> None:
        """Blocking (Init._all_gather), on the current stream: one padded buffer per parameter, which it becomes."""
        absent = [p for p in params if p.status is NOT_AVAILABLE]
        for p in absent:
            if self.world > 1 or len(absent) == 1:
                self._make_whole(p, padded=True)
            p.status = AVAILABLE

    def start(self, params: list[Sharded]) -> None:
        """Start one all-gather of parameters that are not there."""
        handle = Handle(params)
        trace, inflight = self.tape.trace, self.inflight
        trace.stream = self.stream
        if len(params) == 1:
            if self.world > 1:
                self._make_whole(params[0], padded=True)
        else:
            params.sort(key=by_ds_id)
            if self.world > 1:
                padded = sum([p.shard_numel for p in params]) * self.world
                handle.flat = self.tape.new(padded, params[0].itemsize, "ZeRO-3 all-gather", COMM)
        trace.stream = 0
        for p in params:
            p.status = INFLIGHT
            inflight[p] = handle

    def gather_alone(self, p: Sharded) -> None:
        """``start`` with one parameter and ``wait`` at once."""
        if self.world > 1:
            trace = self.tape.trace
            trace.stream = self.stream
            self._make_whole(p, padded=True)
            trace.stream = 0
        p.status = AVAILABLE

    def wait(self, p: Sharded) -> None:
        """Make a parameter in flight available, and with it all that its all-gather brings."""
        handle = self.inflight.pop(p)
        if handle.complete:
            return
        handle.complete = True
        if handle.flat is None:
            for q in handle.params:
                q.status = AVAILABLE
            return
        trace = self.tape.trace
        trace.stream = self.stream
        for q in handle.params:
            self._make_whole(q, padded=False)
            q.status = AVAILABLE
        trace.stream = 0
