"""Live CPU tensor storages, counted one by one: what stands for the allocator where there is no GPU.

A dispatch mode sees the result of every operation on this thread (autograd's backward on a CPU runs on
the calling thread). A storage is entered when it is first seen, under the address of its StorageImpl,
and leaves when it dies, which a weak reference tells: no lifetime changes. ``UntypedStorage.resize_``
bypasses dispatch (FSDP2 frees and refills gathered parameters with it), so it is wrapped while the
tracker runs (``cpu_patches``). The rules are those of ``torch.distributed._tools.MemTracker``, which the
tests hold it against.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from lab.measure.cpu_patches import seeing_resizes, settling_collectives


def local_storages(tensor: Tensor) -> Iterator[Any]:
    """The untyped storages that hold a tensor's data: of the inner tensors for DTensor and other wrappers."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        yield tensor.untyped_storage()
    elif is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor):
                yield from local_storages(inner)
    else:
        yield tensor.untyped_storage()


class StorageTracker:
    """Current and peak bytes of live CPU storages, as one thread sees them."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._current = 0
        self._live: dict[int, tuple[int, Any]] = {}  # StorageImpl address -> bytes, weak reference
        # A storage may die on another thread (gloo's workers drop a collective's tensors when they get to it).
        # There only this deque is touched, whose append is atomic; the tracker's own thread does the arithmetic.
        self._died: deque[int] = deque()
        self._running: ExitStack | None = None

    def start(self) -> None:
        """Begin to see operations on this thread. Tensors made before need ``register``."""
        if self._running is None:
            self._running = ExitStack()
            self._running.enter_context(seeing_resizes(self._see))
            self._running.enter_context(settling_collectives())
            self._running.enter_context(_Mode(self))

    def stop(self) -> None:
        """Stop seeing operations; the counts stay as they are, storages that die still leave."""
        if self._running is not None:
            self._running.close()
            self._running = None

    @property
    def current_bytes(self) -> int:
        while self._died:
            self._current -= self._died.popleft()
        return self._current

    def reset_peak(self) -> None:
        self.peak_bytes = self.current_bytes

    def register(self, tensors: Iterable[Tensor]) -> int:
        """Enter tensors made before ``start``; returns the bytes that were not known yet."""
        before = self.current_bytes
        for tensor in tensors:
            self.see(tensor)
        return self.current_bytes - before

    def see(self, tensor: Tensor) -> None:
        for storage in local_storages(tensor):
            self._see(storage)

    def sizes(self) -> dict[int, int]:
        """Bytes of every live storage, by the address of its StorageImpl (``_cdata``)."""
        return {key: size for key, (size, _) in list(self._live.items())}

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        entry = self._live.get(key)
        if entry is not None:
            size = storage.nbytes()
            if size == entry[0]:
                return
            self._live[key] = (size, entry[1])
            change = size - entry[0]
        else:
            if storage.device.type != "cpu" or not storage.resizable():
                return  # meta and fake tensors; memory lent by numpy or a file, which no allocator of torch's made
            size = storage.nbytes()
            self._live[key] = (size, weakref.ref(storage, partial(self._gone, key)))
            change = size
        current = self._current = self.current_bytes + change
        if current > self.peak_bytes:
            self.peak_bytes = current

    def _gone(self, key: int, _: Any) -> None:
        self._died.append(self._live.pop(key)[0])


class _Mode(TorchDispatchMode):  # type: ignore[misc]
    """Hands every operation's results to the tracker."""

    def __init__(self, tracker: StorageTracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor runs first and comes back with its local tensors
        result = func(*args, **kwargs) if kwargs else func(*args)
        self._see(result)
        return result

    def _see(self, result: Any) -> None:
        if isinstance(result, Tensor):
            self._tracker.see(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                self._see(item)
