"""Everything the allocator has handed out at one moment, and which part of it holds a given storage.

CUDA: the active blocks of the caching allocator's snapshot, with their rounded sizes, so that the sum is
``allocated`` to the byte; a storage belongs to the block that its address lies in. CPU: the storages of
the tracker.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lab.measure.cpu_tracker import StorageTracker

BLOCK_UNIT_BYTES = 512  # kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp: what every request is rounded up to


class Allocation(NamedTuple):
    """Bytes that count as allocated, and the bytes that were asked for (fewer where the allocator rounds up).

    ``tensor_bytes``: the request in the allocator's unit. A block may be larger still: a rest of up to 1 MiB that is
    not worth a block of its own stays with it, and where that happens hangs on what was freed before.
    """

    size_bytes: int
    requested_bytes: int
    tensor_bytes: int


@dataclass(frozen=True)
class Census:
    """Allocations by a key of their own, and ``find(storage)`` -> key, None for a storage that lives elsewhere."""

    allocations: Mapping[int, Allocation]
    find: Callable[[Any], int | None]


def cpu_census(tracker: StorageTracker) -> Census:
    """The live storages that the tracker knows."""
    allocations = {key: Allocation(size, size, size) for key, size in tracker.sizes().items() if size}

    def find(storage: Any) -> int | None:
        key: int = storage._cdata
        return key if key in allocations else None

    return Census(allocations, find)


def cuda_census(index: int) -> Census:
    """The blocks of device ``index`` in use. Takes milliseconds; waits for nothing on the device."""
    # From some version on the allocator's history (recorded under measure=snapshot) can be left out.
    newer = "include_traces" in inspect.signature(torch.cuda.memory_snapshot).parameters
    return census_of_segments(torch.cuda.memory_snapshot(**({"include_traces": False} if newer else {})), index)


def census_of_segments(segments: list[dict[str, Any]], index: int) -> Census:
    """Census of an allocator snapshot's segments.

    A block that was freed while another stream may still use it (``active_awaiting_free``) counts as
    active, no longer as allocated, and is left out.
    """
    allocations: dict[int, Allocation] = {}
    for segment in segments:
        if segment["device"] != index:
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                requested = block["requested_size"]
                in_units = -(-requested // BLOCK_UNIT_BYTES) * BLOCK_UNIT_BYTES
                allocations[address] = Allocation(block["size"], requested, in_units)
            address += block["size"]
    starts = sorted(allocations)

    def find(storage: Any) -> int | None:
        if storage.device.type != "cuda" or storage.nbytes() == 0:
            return None
        pointer = storage.data_ptr()
        at = bisect_right(starts, pointer) - 1
        return starts[at] if at >= 0 and pointer < starts[at] + allocations[starts[at]].size_bytes else None

    return Census(allocations, find)


def by_size(allocations: Mapping[int, Allocation], most: int = 20) -> str:
    """'3 x 512 B, 1 x 2097152 B, ...': bytes asked for, counted by size, the sizes with most bytes in all first."""
    counts = Counter(a.requested_bytes for a in allocations.values())
    counted = sorted(counts.items(), key=lambda pair: -pair[0] * pair[1])
    shown = ", ".join(f"{count} x {size} B" for size, count in counted[:most])
    return shown + (f", and {len(counted) - most} more sizes" if len(counted) > most else "")
