"""Everything the allocator has handed out at one moment, and which part of it holds a given storage.

CUDA: the active blocks of the caching allocator's snapshot, with their rounded sizes, so that the sum is
``allocated`` to the byte; a storage belongs to the block that its address lies in. CPU: the storages of
the tracker.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lab.measure.cpu_tracker import StorageTracker


@dataclass(frozen=True)
class Census:
    """Allocations: key -> bytes, and ``find(storage)`` -> key, None for a storage that lives elsewhere."""

    sizes: Mapping[int, int]
    find: Callable[[Any], int | None]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())


def cpu_census(tracker: StorageTracker) -> Census:
    """The live storages that the tracker knows."""
    sizes = tracker.sizes()

    def find(storage: Any) -> int | None:
        key: int = storage._cdata
        return key if key in sizes else None

    return Census(sizes, find)


def cuda_census(index: int) -> Census:
    """The blocks of device ``index`` in use. Takes milliseconds; waits for nothing on the device."""
    return census_of_segments(torch.cuda.memory_snapshot(), index)


def census_of_segments(segments: list[dict[str, Any]], index: int) -> Census:
    """Census of an allocator snapshot's segments.

    A block that was freed while another stream may still use it (``active_pending_free``) counts as
    active, no longer as allocated, and is left out.
    """
    sizes: dict[int, int] = {}
    for segment in segments:
        if segment["device"] != index:
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                sizes[block.get("address", address)] = block["size"]
            address += block["size"]
    starts = sorted(sizes)

    def find(storage: Any) -> int | None:
        if storage.device.type != "cuda" or storage.nbytes() == 0:
            return None
        pointer = storage.data_ptr()
        at = bisect_right(starts, pointer) - 1
        return starts[at] if at >= 0 and pointer < starts[at] + sizes[starts[at]] else None

    return Census(sizes, find)


def by_size(sizes: Mapping[int, int], most: int = 20) -> str:
    """'3 x 512 B, 1 x 2097152 B, ...': allocations counted by size, those with most bytes in all first."""
    counted = sorted(Counter(s for s in sizes.values() if s).items(), key=lambda pair: -pair[0] * pair[1])
    shown = ", ".join(f"{count} x {size} B" for size, count in counted[:most])
    return shown + (f", and {len(counted) - most} more sizes" if len(counted) > most else "")
