"""The allocator's counters behind one interface: PyTorch's CUDA caching allocator, or the CPU tracker.

Everything here runs on the host and waits for nothing on the device: the allocator is host code, and
its counters move when a tensor is made or dropped, not when the GPU gets there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lab.measure.census import Census, cpu_census, cuda_census
from lab.measure.cpu_patches import settle
from lab.measure.cpu_tracker import StorageTracker
from lab.measure.timing import Clock

_DEVICE_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Counters:
    """One reading, bytes; the peaks are since the last ``reset_peak``, the two counts since the process began."""

    allocated: int
    peak_allocated: int
    active: int
    peak_active: int
    reserved: int
    peak_reserved: int
    num_alloc_retries: int = 0
    num_ooms: int = 0


class Backend(Clock, Protocol):
    """What the meter needs of a device."""

    source: str  # RankMeasurement.source
    device_name: str
    notes: list[str]

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def read(self) -> Counters: ...
    def reset_peak(self) -> None: ...
    def register(self, tensors: Iterable[Tensor]) -> int: ...
    def census(self) -> Census: ...


class CudaBackend:
    """The CUDA caching allocator of one device; time by CUDA events, drawn from a pool."""

    source = "cuda_caching_allocator"

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # the counters do not exist before
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.device_name: str = torch.cuda.get_device_name(self.index)
        self.notes: list[str] = []
        self._events: list[Any] = []

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def read(self) -> Counters:
        stats = torch.cuda.memory_stats_as_nested_dict(self.index)  # one call into the allocator, not flattened
        allocated = stats["allocated_bytes"]["all"]
        active = stats["active_bytes"]["all"]
        reserved = stats["reserved_bytes"]["all"]
        return Counters(
            allocated["current"],
            allocated["peak"],
            active["current"],
            active["peak"],
            reserved["current"],
            reserved["peak"],
            stats["num_alloc_retries"],
            stats["num_ooms"],
        )

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.index)

    def register(self, tensors: Iterable[Tensor]) -> int:
        """The allocator knows every tensor."""
        return 0

    def census(self) -> Census:
        return cuda_census(self.index)

    def mark(self) -> Any:
        event = self._events.pop() if self._events else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.index))
        return event

    def elapsed(self, begin: Any, end: Any, wait: bool) -> float | None:
        """Seconds on the device between two marks; None while it has not passed the second. Raises RuntimeError."""
        deadline = time.monotonic() + _DEVICE_PATIENCE_SECONDS
        while not end.query():
            if not wait:
                return None
            if time.monotonic() > deadline:  # a collective whose peer is gone never ends
                raise RuntimeError(f"the device did not come to an end within {_DEVICE_PATIENCE_SECONDS:.0f} s")
            time.sleep(0.001)
        return float(begin.elapsed_time(end)) / 1e3

    def reuse(self, mark: Any) -> None:
        self._events.append(mark)


class CpuBackend:
    """The storage tracker stands for the allocator. There is no caching, so all three levels are one."""

    source = "cpu_storage_tracker"
    device_name = "cpu"

    def __init__(self) -> None:
        self.tracker = StorageTracker()
        self.notes = [
            "on a CPU there is no caching allocator: active and reserved are the allocated bytes, which a dispatch "
            "mode counts by storage; memory that a kernel takes and frees inside one operation is not seen"
        ]

    def start(self) -> None:
        self.tracker.start()

    def stop(self) -> None:
        self.tracker.stop()

    def read(self) -> Counters:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            settle()  # as after a wait; DDP's own waits are in C++
        now, peak = self.tracker.current_bytes, self.tracker.peak_bytes
        return Counters(now, peak, now, peak, now, peak)

    def reset_peak(self) -> None:
        self.tracker.reset_peak()

    def register(self, tensors: Iterable[Tensor]) -> int:
        """Tensors that must be live; returns the bytes among them that the tracker had not seen."""
        return self.tracker.register(tensors)

    def census(self) -> Census:
        return cpu_census(self.tracker)

    def mark(self) -> Any:
        return time.perf_counter()

    def elapsed(self, begin: Any, end: Any, wait: bool) -> float | None:
        return float(end - begin)

    def reuse(self, mark: Any) -> None: ...


def make_backend(device: torch.device) -> CudaBackend | CpuBackend:
    """The backend of a device. Raises ValueError for a device type without one."""
    if device.type == "cuda":
        return CudaBackend(device)
    if device.type == "cpu":
        return CpuBackend()
    raise ValueError(f"no memory counters for device type {device.type}")
