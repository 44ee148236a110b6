"""ZeRO-3's parameter coordinator: when whole parameters are gathered, prefetched and released, and in which buffers.

Source: DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py (PartitionedParameterCoordinator: when) and
partition_parameters.py (all_gather_coalesced, AllGatherHandle, AllGatherCoalescedHandle: which buffers). Method
names are DeepSpeed's where there is one. N = world_size, e = bytes per parameter element.

- One parameter: a buffer of e * N * ceil(numel / N), which becomes the parameter (``_all_gather_sequential``).
- Several: one flat buffer of the sum of those, then, when the first of them is waited for, a copy of e * numel per
  parameter. The flat buffer lives until the last of them has been used (each holds the handle until then).
- The first forward and backward records the order of modules, gathers at use and releases after use. From the next
  one on the coordinator prefetches and keeps what is used again soon:
  ``stage3_prefetch_bucket_size``: elements at which one module's prefetch stops asking for more;
  ``stage3_max_live_parameters``: no prefetch beyond this many gathered elements. It releases nothing;
  ``stage3_max_reuse_distance``: a parameter that is used again within this many elements is not released;
  ``stage3_param_persistence_threshold``: smaller parameters are not released between optimizer steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from lab.analytic.ops import Parameter
from lab.analytic.tape import Tape, Tensor
from lab.config import ZeroOptions
from lab.vocab import MemoryCategory

GATHERED, COMM = MemoryCategory.GATHERED_PARAMETERS, MemoryCategory.COMM_BUFFERS
NOT_AVAILABLE, INFLIGHT, AVAILABLE = "not available", "in flight", "available"  # ZeroParamStatus
NEVER = -(10**10)


@dataclass(eq=False)
class Sharded:
    """One parameter: ``index`` is ds_id, ``shard_numel`` the padded share of a rank (partition_numel)."""

    parameter: Parameter
    index: int
    shard_numel: int
    persist: bool
    status: str = NOT_AVAILABLE
    active: set[str] = field(default_factory=set)  # ds_active_sub_modules

    @property
    def numel(self) -> int:
        return self.parameter.numel


@dataclass
class Handle:
    """An all-gather under way; ``flat`` is what it fills when several parameters share it."""

    params: list[Sharded]
    flat: Tensor | None = None
    complete: bool = False


class Coordinator:
    """``members``: the parameters that each module holds directly (iter_params), by module name."""

    def __init__(self, tape: Tape, options: ZeroOptions, world: int, members: dict[str, list[Sharded]]) -> None:
        self.tape, self.options, self.world, self.members = tape, options, world, members
        self.all = {p.index: p for params in members.values() for p in params}
        # overlap_comm (on by default for stage 3) gathers on a stream of its own; the allocator keeps a pool for it.
        self.stream = 0 if options.overlap_comm is False else 1
        self.trace_mode = "invalid"  # then "record", then "complete"
        self.submodules: list[str] = []
        self.param_order: list[tuple[Sharded, int]] = []
        self.queue: deque[tuple[Sharded, int]] = deque()
        self.fetched_for: dict[Sharded, int] = {}  # most_recent_step_id_param_fetched_for
        self.inflight: dict[Sharded, Handle] = {}
        self.num_available = 0  # elements
        self.step_id = 0
        self.backward_modules: dict[str, None] = {}  # active_backward_submodules
        self.release_cache: dict[tuple[str, int], set[Sharded]] = {}  # lru_cache of params_to_release

    # -- whole parameters ------------------------------------------------------------------------

    def _whole(self, p: Sharded, padded: bool) -> Tensor:
        size = p.parameter.tensor.itemsize
        numel = p.shard_numel * self.world if padded else p.numel
        storage = self.tape.new(numel, size, f"gathered {p.parameter.name}", GATHERED).storage
        return Tensor(storage, p.numel, size)

    def all_gather(self, params: list[Sharded]) -> None:
        """Blocking (Init._all_gather): one padded buffer per parameter, each of which becomes the parameter."""
        for p in params:
            if p.status == NOT_AVAILABLE:
                if self.world > 1:
                    p.parameter.tensor = self._whole(p, padded=True)
                p.status = AVAILABLE

    def partition(self, p: Sharded) -> None:
        """free_param: ``data`` becomes an empty tensor."""
        size = p.parameter.tensor.itemsize
        empty = self.tape.new(0, size, "")
        p.parameter.tensor = Tensor(empty.storage, p.numel, size)
        p.status = NOT_AVAILABLE

    def _all_gather_coalesced(self, params: list[Sharded]) -> None:
        """Start one all-gather for all of ``params``. With one rank the shard itself is the parameter."""
        params = sorted((p for p in params if p.status == NOT_AVAILABLE), key=lambda p: p.index)
        if not params:
            return
        self.num_available += sum(p.numel for p in params)
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

    def _wait(self, p: Sharded) -> None:
        """AllGatherCoalescedHandle.wait: the first to wait copies every parameter out of the flat buffer."""
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

    # -- trace -----------------------------------------------------------------------------------

    def reset_step(self) -> None:
        """At every forward's start, so once per micro-step."""
        for p in list(self.inflight):
            self._wait(p)
            self._release(p)
        if self.trace_mode == "record":
            for step, module in enumerate(self.submodules):
                self.param_order += [(p, step) for p in sorted(self.members[module], key=lambda p: p.index)]
            self.trace_mode = "complete"
        elif self.trace_mode == "invalid":
            self.trace_mode = "record"
        self.queue = deque(self.param_order)
        self.fetched_for = {}
        self.step_id = self.num_available = 0

    def fetch(self, module: str, forward: bool) -> None:
        """fetch_sub_module: gather what the module needs now, wait for it, prefetch what comes next."""
        if self.trace_mode == "record":
            self.submodules.append(module)
        assert self.trace_mode == "record" or self.submodules[self.step_id] == module, "DeepSpeed would trace again"
        if not forward:
            self.backward_modules[module] = None
        params = self.members[module]
        self._all_gather_coalesced(params)
        for p in params:
            p.active.add(module)
            if p in self.inflight:
                self._wait(p)
        if self.trace_mode == "complete":
            self._forget(params)
            self._prefetch()
        self.step_id += 1

    def _forget(self, params: list[Sharded]) -> None:
        """Take the module's own parameters off the queue, unless a prefetch has."""
        ahead = {p for p in params if self.fetched_for.get(p, NEVER) < self.step_id}
        found: set[Sharded] = set()
        while self.queue and len(found) < len(ahead):
            p, step = self.queue.popleft()
            self.fetched_for[p] = step
            found.add(p)

    def _prefetch(self) -> None:
        room = min(
            self.options.stage3_max_live_parameters - self.num_available, self.options.stage3_prefetch_bucket_size
        )
        wanted: dict[Sharded, None] = {}
        numel = 0
        while self.queue and numel < room:
            p, step = self.queue.popleft()
            self.fetched_for[p] = max(self.fetched_for.get(p, NEVER), step)
            if p.status == NOT_AVAILABLE and p not in wanted:
                wanted[p] = None
                numel += p.numel
        self._all_gather_coalesced(list(wanted))

    # -- release ---------------------------------------------------------------------------------

    def release(self, module: str, forward: bool) -> None:
        """release_sub_module: after the module's forward, and after its backward."""
        params = self.members[module]
        free = self._params_to_release(module) if self.trace_mode == "complete" else set(params)
        if not forward:
            self.backward_modules.pop(module, None)
        for p in params:
            p.active.discard(module)
            if p in free:
                self._release(p)

    def _params_to_release(self, module: str) -> set[Sharded]:
        """Decided once per module and place in the order, in the first pass over the complete trace (lru_cache)."""
        key = (module, self.step_id)
        if key not in self.release_cache:
            free = {p for p in self.members[module] if not p.persist}
            free -= {p for p in free if self.fetched_for.get(p, NEVER) > self.step_id}
            traversed = 0
            for later in self.submodules[self.step_id :]:
                if traversed >= self.options.stage3_max_reuse_distance:
                    break
                free -= set(self.members[later])
                traversed += sum(p.numel for p in self.members[later])
            self.release_cache[key] = free
        return self.release_cache[key]

    def _release(self, p: Sharded) -> None:
        if p.status == AVAILABLE and not p.active:
            self.partition(p)
            self.num_available -= p.numel

    def release_backward_leftovers(self) -> None:
        """At a backward's end: modules whose input needed no gradient were never told that theirs was done."""
        while self.backward_modules:
            module = self.backward_modules.popitem()[0]
            for p in self.members[module]:
                p.active.discard(module)
                if not p.persist:
                    self._release(p)

    def release_and_reset_all(self) -> None:
        """At the optimizer step's start: every parameter, persistent ones too."""
        for p in self.all.values():
            if p in self.inflight:
                self._wait(p)
            p.active.clear()
            self._release(p)
