"""ZeRO-3's parameter coordinator: when parameters are fetched, prefetched and released.

Source: DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py; names are DeepSpeed's where there is one.

The first forward and backward records the order of modules, gathers at use and releases after use. From the next one
on (the next micro-step, if there are several) it prefetches, and keeps what is used again soon:

- ``stage3_prefetch_bucket_size``: elements at which one module's prefetch stops asking for more;
- ``stage3_max_live_parameters``: no prefetch beyond this many gathered elements. It releases nothing;
- ``stage3_max_reuse_distance``: a parameter that is used again within this many elements is not released;
- ``stage3_param_persistence_threshold``: parameters up to this size are released for the optimizer step only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

from lab.analytic.sharding.zero3_gather import AVAILABLE, NOT_AVAILABLE, Gatherer, Sharded
from lab.config import ZeroOptions

NEVER = -(10**10)


class Coordinator:
    """``members``: the parameters that each module holds directly (iter_params), by module name."""

    def __init__(self, gatherer: Gatherer, options: ZeroOptions, members: dict[str, list[Sharded]]) -> None:
        self.gatherer, self.options, self.members = gatherer, options, members
        self.trace_mode = "invalid"  # then "record", then "complete"
        self.submodules: list[str] = []
        self.param_order: list[tuple[Sharded, int]] = []
        self.queue: deque[tuple[Sharded, int]] = deque()
        self.fetched_for: dict[Sharded, int] = {}  # most_recent_step_id_param_fetched_for
        self.num_available = 0  # elements
        self.step_id = 0
        self.backward_modules: dict[str, None] = {}  # active_backward_submodules
        self.release_cache: dict[tuple[str, int], set[Sharded]] = {}  # lru_cache of params_to_release

    def _of(self, module: str) -> list[Sharded]:
        return self.members.get(module, [])

    def reset_step(self) -> None:
        """At every forward's start, so once per micro-step."""
        for p in list(self.gatherer.inflight):
            self.gatherer.wait(p)
            self._release(p)
        if self.trace_mode == "record":
            for step, module in enumerate(self.submodules):
                self.param_order += [(p, step) for p in sorted(self._of(module), key=lambda p: p.index)]
            self._index_trace()
            self.trace_mode = "complete"
        elif self.trace_mode == "invalid":
            self.trace_mode = "record"
        self.queue = deque(self.param_order)
        self.fetched_for = {}
        self.step_id = self.num_available = 0

    # -- fetch -----------------------------------------------------------------------------------

    def fetch(self, module: str, forward: bool) -> None:
        """fetch_sub_module: gather what the module needs now, wait for it, prefetch what comes next."""
        if self.trace_mode == "record":
            self.submodules.append(module)
        assert self.submodules[self.step_id] == module, "DeepSpeed would drop its trace and record again"
        if not forward:
            self.backward_modules[module] = None
        params = self._of(module)
        if params:
            self.num_available += self.gatherer.start(params)
        for p in params:
            p.active.add(module)
            if p in self.gatherer.inflight:
                self.gatherer.wait(p)
        if self.trace_mode == "complete" and self.queue:
            if params:
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
        live = self.options.stage3_max_live_parameters - self.num_available
        room = min(live, self.options.stage3_prefetch_bucket_size)
        if room <= 0:
            return
        wanted: dict[Sharded, None] = {}
        numel = 0
        while self.queue and numel < room:
            p, step = self.queue.popleft()
            self.fetched_for[p] = max(self.fetched_for.get(p, NEVER), step)
            if p.status == NOT_AVAILABLE and p not in wanted:
                wanted[p] = None
                numel += p.numel
        self.num_available += self.gatherer.start(list(wanted))

    # -- release ---------------------------------------------------------------------------------

    def release(self, module: str, forward: bool) -> None:
        """release_sub_module: after the module's forward, and after its backward."""
        params = self._of(module)
        if not forward:
            self.backward_modules.pop(module, None)
        if not params:
            return
        free = self._params_to_release(module) if self.trace_mode == "complete" else set(params)
        for p in params:
            p.active.discard(module)
            if p in free:
                self._release(p)

    def _params_to_release(self, module: str) -> set[Sharded]:
        """Decided once per module and place in the order, in the first pass over the complete trace (lru_cache)."""
        key = (module, self.step_id)
        if key not in self.release_cache:
            free = {p for p in self._of(module) if not p.persist}
            free -= {p for p in free if self.fetched_for.get(p, NEVER) > self.step_id}
            self.release_cache[key] = {p for p in free if not self._reused_soon(p)}
        return self.release_cache[key]

    def _index_trace(self) -> None:
        """Where each parameter is used, and how many elements the modules before each place use."""
        self.uses: dict[Sharded, list[int]] = {}
        self.elements_before = [0]
        for step, module in enumerate(self.submodules):
            for p in self._of(module):
                self.uses.setdefault(p, []).append(step)
            self.elements_before.append(self.elements_before[-1] + sum(p.numel for p in self._of(module)))

    def _reused_soon(self, p: Sharded) -> bool:
        """Does a later module, less than ``stage3_max_reuse_distance`` elements on, use it?"""
        uses = self.uses[p]
        later = bisect_left(uses, self.step_id)
        if later == len(uses):
            return False
        distance = self.elements_before[uses[later]] - self.elements_before[self.step_id]
        return distance < self.options.stage3_max_reuse_distance

    def _release(self, p: Sharded) -> None:
        if p.status == AVAILABLE and not p.active:
            self.gatherer.partition(p)
            self.num_available -= p.numel

    def release_backward_leftovers(self) -> None:
        """At a backward's end: modules whose input needed no gradient were never told that theirs was done."""
        while self.backward_modules:
            for p in self._of(module := self.backward_modules.popitem()[0]):
                p.active.discard(module)
                if not p.persist:
                    self._release(p)

    def release_and_reset_all(self) -> None:
        """At the optimizer step's start: every parameter, persistent ones too."""
        for p in {p: None for params in self.members.values() for p in params}:
            if p in self.gatherer.inflight:
                self.gatherer.wait(p)
            p.active.clear()
            self._release(p)
