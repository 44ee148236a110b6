"""The ledger: live bytes by category at a phase's end, every allocation counted once.

An allocation belongs to the first that claims it: the engine's tensors (parameters, gradients, optimizer
states, buffers), then what autograd saved for backward. What nobody claims is unattributed.

Saved tensors are seen by ``torch.autograd.graph.saved_tensors_hooks`` around the forward pass. The pack
hook remembers the storage weakly and hands back what autograd would have kept by itself: a leaf as it is
(ZeRO-3 swaps the data of a parameter between forward and backward, so an alias would keep the gathered
one alive), anything else as a detached alias (the tensor itself would be a reference cycle through its
own graph node). So the hooks move no peak and no end; ``tests/unit/test_measure_ledger.py`` and
``tests/distributed/test_measure_strategies.py`` compare both to the byte.
Inside a checkpointed block the checkpoint's own hooks replace these, and autograd saves nothing there
but the block's inputs, which these do see. Selective checkpointing keeps tensors in caches of its own,
which are looked up among Python's objects, and so are the arguments that transformers binds to a checkpointed layer
(positions, rotary tables, the mask).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lab.measure.census import Allocation, Census
from lab.measure.cpu_tracker import local_storages
from lab.vocab import MemoryBreakdown, MemoryCategory

Known = list[tuple[MemoryCategory, Tensor]]


@dataclass
class LedgerReading:
    """Live bytes by category, and the allocations that nobody claimed."""

    categories: MemoryBreakdown
    unclaimed: dict[int, Allocation] = field(default_factory=dict)
    tensors: MemoryBreakdown = field(default_factory=MemoryBreakdown)  # without the rests that stay with blocks

    @property
    def unattributed_bytes(self) -> int:
        return sum(allocation.size_bytes for allocation in self.unclaimed.values())

    def move(self, key: int, category: MemoryCategory) -> None:
        """An unclaimed allocation turns out to be of a category."""
        allocation = self.unclaimed.pop(key)
        self.categories[category] += allocation.size_bytes
        self.tensors[category] += allocation.tensor_bytes


class Ledger:
    """Sorts allocations into categories. ``vocab_size`` tells logits from other saved tensors.

    ``selective``: checkpointing is. ``bound``: checkpointed functions have arguments bound to them.
    """

    def __init__(
        self, vocab_size: int, workspace_sizes: Iterable[int] = (), selective: bool = False, bound: bool = False
    ) -> None:
        self._vocab_size = vocab_size
        self._workspace_sizes = frozenset(size for size in workspace_sizes if size)
        self._selective, self._bound = selective, bound
        self._claims: dict[int, tuple[MemoryCategory, Any]] = {}  # StorageImpl address -> category, weak reference
        self._leaves: dict[int, weakref.ref[Tensor]] = {}  # by id: leaves of the graph, through views that were saved

    def watch_forward(self) -> AbstractContextManager[Any]:
        """Around a forward pass: see what autograd saves."""
        hooks: AbstractContextManager[Any] = torch.autograd.graph.saved_tensors_hooks(self._pack, _same)
        return hooks

    def claim(self, category: MemoryCategory, tensor: Tensor) -> None:
        """Remember, weakly, that a tensor's storage belongs to a category for as long as it lives."""
        for storage in local_storages(tensor):
            key = storage._cdata
            self._claims[key] = (category, weakref.ref(storage, partial(self._gone, key)))

    def count(self, known: Known, census: Census, unseen: Iterable[tuple[MemoryCategory, int]] = ()) -> LedgerReading:
        """Who holds what: first ``known``, then claims and saved tensors, then ``unseen``.

        ``unseen`` are allocations without a Python tensor (DDP's buckets), by the bytes asked for: each
        takes one unclaimed allocation of exactly that size, if there is one.
        """
        owner: dict[int, MemoryCategory] = {}

        def own(category: MemoryCategory, storage: Any) -> None:
            key = census.find(storage)
            if key is not None:
                owner.setdefault(key, category)

        for category, tensor in known:
            for storage in local_storages(tensor):
                own(category, storage)
        if self._selective:
            self._claim_checkpoint_caches()
        if self._bound:
            self._claim_bound_arguments()
        for leaf in [reference() for reference in self._leaves.values()]:
            if leaf is not None and leaf.grad is not None:  # a parameter's own is among ``known``, as a gradient
                for storage in local_storages(leaf.grad):
                    own(MemoryCategory.ACTIVATIONS, storage)
        for category, reference in list(self._claims.values()):
            storage = reference()
            if storage is not None:
                own(category, storage)
        reading = LedgerReading(MemoryBreakdown(), dict(census.allocations))
        for key, category in owner.items():
            reading.move(key, category)
        for category, size in unseen:
            match = next((k for k, a in reading.unclaimed.items() if a.requested_bytes == size), None)
            if match is not None:
                reading.move(match, category)
        return reading

    def settle_workspaces(self, readings: list[LedgerReading]) -> None:
        """Find the library workspaces in one step's readings, the last of them from the step's end.

        cuBLAS takes its workspaces from the allocator without a tensor, and keeps them. They are the
        unclaimed blocks of exactly a workspace's size that are still there when the step is over and
        nothing saved for backward is left.
        """
        if not readings:
            return
        last = readings[-1].unclaimed
        workspaces = {key for key, a in last.items() if a.requested_bytes in self._workspace_sizes}
        for reading in readings:
            for key in workspaces & reading.unclaimed.keys():
                reading.move(key, MemoryCategory.LIBRARY_WORKSPACES)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._claim_saved(tensor)
        self._remember_leaf(tensor)
        return tensor if tensor.is_leaf else tensor.detach()

    def _remember_leaf(self, tensor: Tensor) -> None:
        """The leaf under a saved view. It may be nobody's parameter: peft makes a new one of a Conv1D's weight, whose
        gradient stays until the graph goes.
        """
        for function, _ in tensor.grad_fn.next_functions if tensor.grad_fn is not None else ():
            leaf = getattr(function, "variable", None)  # AccumulateGrad's
            if leaf is not None and id(leaf) not in self._leaves:
                self._leaves[id(leaf)] = weakref.ref(leaf, partial(self._forget, id(leaf)))

    def _forget(self, key: int, reference: Any) -> None:
        if self._leaves.get(key) is reference:
            del self._leaves[key]

    def _claim_saved(self, tensor: Tensor) -> None:
        category = self._saved_category(tensor)
        for storage in local_storages(tensor):
            key = storage._cdata
            if key not in self._claims or category is MemoryCategory.LOGITS_AND_LOSS:
                self._claims[key] = (category, weakref.ref(storage, partial(self._gone, key)))

    def _saved_category(self, tensor: Tensor) -> MemoryCategory:
        """Row-major with vocab_size columns: logits. A head's weight is saved transposed, so it is not."""
        if 2 <= tensor.dim() <= 3 and tensor.shape[-1] == self._vocab_size and tensor.stride(-1) == 1:
            return MemoryCategory.LOGITS_AND_LOSS
        return MemoryCategory.ACTIVATIONS

    def _claim_checkpoint_caches(self) -> None:
        from torch.utils.checkpoint import _VersionWrapper  # what selective checkpointing wraps a cached output in

        for thing in gc.get_objects():
            if type(thing) is _VersionWrapper and isinstance(thing.val, Tensor):
                self._claim_saved(thing.val)

    def _claim_bound_arguments(self) -> None:
        """functools.partial's, in the frames of non-reentrant checkpointing (transformers/modeling_layers.py)."""
        from torch.utils.checkpoint import _CheckpointFrame

        for thing in gc.get_objects():
            if type(thing) is not _CheckpointFrame:
                continue
            run = thing.recompute_fn
            held = dict(zip(run.__code__.co_freevars, run.__closure__ or (), strict=True))
            function = held["fn"].cell_contents if "fn" in held else None
            for value in function.keywords.values() if isinstance(function, partial) else ():
                for tensor in value if isinstance(value, tuple) else (value,):
                    if isinstance(tensor, Tensor):
                        self._claim_saved(tensor)

    def _gone(self, key: int, reference: Any) -> None:
        claim = self._claims.get(key)
        if claim is not None and claim[1] is reference:
            del self._claims[key]


def _same(packed: Tensor) -> Tensor:
    return packed
