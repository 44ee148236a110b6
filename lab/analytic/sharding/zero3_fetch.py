"""ZeRO-3's parameter coordinator: when parameters are fetched, prefetched and released.

Source: DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py; names are DeepSpeed's where there is one.

The first forward and backward records the order of modules, gathers at use and releases after use. From the next one
on (the next micro-step, if there are several) it prefetches, and keeps what is used again soon:

- ``stage3_prefetch_bucket_size``: elements at which one module's prefetch stops asking for more;
- ``stage3_max_live_parameters``: no prefetch beyond this many gathered elements. It releases nothing;
- ``stage3_max_reuse_distance``: a parameter that is used again within this many elements is not released;
- ``stage3_param_persistence_threshold``: parameters up to this size are released for the optimizer step only.

The frozen parameters that a checkpointed region's recomputation fetches also belong to the module whose backward
started last, and are released when that module's backward is done, or with the backward where no hook says so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain

from lab.analytic.sharding.zero3_gather import AVAILABLE, INFLIGHT, NEVER, NOT_AVAILABLE, Gatherer, Sharded
from lab.analytic.sharding.zero3_modules import Module, Modules
from lab.config import ZeroOptions


class Coordinator:
    """``members``: the parameters that each module holds directly, by module name."""

    def __init__(self, gatherer: Gatherer, options: ZeroOptions, members: dict[str, list[Sharded]]) -> None:
        self.gatherer, self.options = gatherer, options
        self.max_live = options.stage3_max_live_parameters
        self.modules = Modules((name, Module(name, params)) for name, params in members.items())
        self.params = list(dict.fromkeys(chain.from_iterable(members.values())))
        self.trace_mode = "invalid"  # then "record", then "complete"
        self.submodules: list[Module] = []
        self.param_order: list[tuple[Sharded, int]] = []
        self.place_after: list[int] = []  # by module in the order: where the parameters of those behind it begin
        self.place = 0  # in that order: what is before it has been taken off the queue
        self.num_available = 0  # elements
        self.step_id = 0
        self.backward_modules: dict[Module, None] = {}  # active_backward_submodules

    def reset_step(self) -> None:
        """At every forward's start, so once per micro-step."""
        for p in list(self.gatherer.inflight):
            self.gatherer.wait(p)
            self._release(p)
        if self.trace_mode == "record":
            self._index_trace()
            self.trace_mode = "complete"
        elif self.trace_mode == "invalid":
            self.trace_mode = "record"
        for p in self.params:
            p.fetched_for = NEVER
        self.place = self.step_id = self.num_available = 0

    def untouched(self, params: Sequence[Sharded]) -> bool:
        """In the pass that records: are none of these gathered, or about to be? Then each will be where it is used."""
        if self.trace_mode != "record" or self.gatherer.inflight:
            return False
        return all(p.status is NOT_AVAILABLE and not p.active for p in params)

    def read_outside(self, name: str, p: Sharded) -> bool:
        """Module ``name`` reads a parameter of another one: from now on it is its own too. Is it to be gathered?

        parameter_offload.py, ZeROOrderedDict.__getitem__: gathers it at once, the first time, and registers it.
        """
        module = self.modules[name]
        if p in module.params:
            return False
        assert p.status is NOT_AVAILABLE
        module.add(p)
        return True

    # -- fetch -----------------------------------------------------------------------------------

    def fetch(self, module: Module, forward: bool) -> None:
        """fetch_sub_module: gather what the module needs now, wait for it, prefetch what comes next."""
        step, recording = self.step_id, self.trace_mode == "record"
        self.step_id = step + 1
        if recording:
            self.submodules.append(module)
        else:
            assert self.submodules[step] is module, "DeepSpeed would drop its trace and record again"
        if not forward:
            self.backward_modules[module] = None
        if module.params:
            self._gather(module)
            if forward and self.backward_modules:  # which is empty outside backward
                self._recompute(module.params)
        if recording:
            return
        after = self.place_after[step]
        if self.place < after:  # takes the module's own parameters off the queue, unless a prefetch has
            self.place = after
        if self.place < len(self.param_order):
            room = self.max_live - self.num_available
            if room > 0:
                self._prefetch(room)

    def _gather(self, module: Module) -> None:
        gatherer, params = self.gatherer, module.params
        inflight = gatherer.inflight
        missing = [p for p in params if p.status is NOT_AVAILABLE]
        if len(missing) == 1:
            self.num_available += missing[0].numel
            gatherer.gather_alone(missing[0])
        elif missing:
            self.num_available += sum([p.numel for p in missing])
            gatherer.start(missing)
        for p in params:
            p.active.add(module)
            if p in inflight:  # where it may be available already: another one's wait has brought it
                gatherer.wait(p)

    def _recompute(self, params: Sequence[Sharded]) -> None:
        """update_recompute_parameters."""
        owner = next(reversed(self.backward_modules))
        for p in params:
            if not p.parameter.trainable:
                owner.recomputed[p] = None
                p.active.add(owner)

    def _prefetch(self, room: int) -> None:
        """Start gathering what comes next and is not there, until it has a bucket or more, or ``room`` elements."""
        wanted: list[Sharded] = []
        numel, order, place, end = 0, self.param_order, self.place, len(self.param_order)
        room = min(room, self.options.stage3_prefetch_bucket_size)
        while place < end and numel < room:
            p, step = order[place]
            p.fetched_for = step
            place += 1
            if p.status is NOT_AVAILABLE:
                p.status = INFLIGHT  # wanted once, however often it comes
                wanted.append(p)
                numel += p.numel
        self.place = place
        if wanted:
            self.num_available += numel
            self.gatherer.start(wanted)

    # -- release ---------------------------------------------------------------------------------

    def release(self, module: Module, forward: bool) -> None:
        """release_sub_module: after the module's forward, and after its backward."""
        if not forward:
            self.backward_modules.pop(module, None)
            if module.recomputed:
                self._release_recomputed(module)
                return
        params = module.params
        if params:
            for p in params:
                p.active.discard(module)
            for p in self._params_to_release(module) if self.trace_mode == "complete" else params:
                if not p.active:
                    self._release(p)

    def _release_recomputed(self, module: Module) -> None:
        """Its own parameters, and those that a recomputation in its backward has fetched."""
        recomputed, free = module.take_recomputed(), module.params
        if self.trace_mode == "complete":
            free = self._params_to_release(module)
        for p in (*module.params, *recomputed):
            p.active.discard(module)
            if p in free or (p in recomputed and not p.persist):
                self._release(p)

    def _params_to_release(self, module: Module) -> list[Sharded]:
        """Decided once per module and place in the order, in the first pass over the complete trace (lru_cache)."""
        step = self.step_id
        found = module.to_release.get(step)
        if found is None:
            found = module.to_release[step] = []
            for p in module.params:
                if not p.persist and p.fetched_for <= step and not self._reused_soon(p):
                    found.append(p)
        return found

    def _index_trace(self) -> None:
        """Where each parameter is used, and how many elements the modules before each place use."""
        before, order = 0, self.param_order
        self.elements_before = [0]
        for step, module in enumerate(self.submodules):
            for p in module.by_index:
                order.append((p, step))
                p.uses.append(step)
            before += module.numel
            self.elements_before.append(before)
            self.place_after.append(len(order))

    def _reused_soon(self, p: Sharded) -> bool:
        """Does a later module, less than ``stage3_max_reuse_distance`` elements on, use it?"""
        later = bisect_left(p.uses, self.step_id)
        if later == len(p.uses):
            return False
        distance = self.elements_before[p.uses[later]] - self.elements_before[self.step_id]
        return distance < self.options.stage3_max_reuse_distance

    def _release(self, p: Sharded) -> None:
        """free_param, of one that nobody needs: ``data`` becomes an empty tensor."""
        if p.status is AVAILABLE and not p.active:
            p.parameter.tensor = p.absent
            p.status = NOT_AVAILABLE
            self.num_available -= p.numel

    def release_backward_leftovers(self) -> None:
        """At a backward's end: modules whose input needed no gradient were never told that theirs was done."""
        while self.backward_modules:
            module = self.backward_modules.popitem()[0]
            for p in (*module.params, *module.take_recomputed()):
                p.active.discard(module)
                if not p.persist:
                    self._release(p)

    def release_and_reset_all(self) -> None:
        """At the optimizer step's start: every parameter, persistent ones too."""
        inflight = self.gatherer.inflight
        for p in self.params:
            if p in inflight:
                self.gatherer.wait(p)
            p.active.clear()
            self._release(p)
