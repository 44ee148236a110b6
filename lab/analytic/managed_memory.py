"""CUDA managed memory on the GPU, where bitsandbytes keeps paged optimizer states.

The driver fills it in pages of 4 KiB (or 16 together), cut from root chunks of 2 MiB, and takes those from the card
1 << uvm_perf_pma_batch_nonpinned_order (6) at a time.
Source: open-gpu-kernel-modules, kernel-open/nvidia-uvm/uvm_pmm_gpu.c.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from lab.analytic.tape import aligned

PAGE = 4 << 10
ROOT = 2 << 20
BATCH = 64 * ROOT
ALIGNMENT = 512  # bytes


class ManagedMemory:
    """Room on the GPU for what cudaMallocManaged gives, all of it touched there.

    Allocations up to 2 MiB share blocks of 2 MiB, each filled as a whole: one goes to the block with the least room
    that has enough. Larger ones take whole root chunks, and pages for the rest. Measured on an H200, driver 580.159, by
    experiments/optimizers/managed_memory.py; its results beside it are a test.
    """

    def __init__(self) -> None:
        self.requested_bytes = 0
        self._roots = 0  # filled as a whole
        self._pages = 0  # beside them
        self._room: list[int] = []  # bytes left in each shared block, ascending

    def take(self, nbytes: int) -> None:
        """One allocation."""
        self.requested_bytes += nbytes
        if nbytes > ROOT:
            self._roots += nbytes // ROOT
            self._pages += -(-(nbytes % ROOT) // PAGE)
            return
        size, room = aligned(nbytes, ALIGNMENT), self._room
        place = bisect_left(room, size)
        if place == len(room):
            self._roots += 1
            left = ROOT - size
        else:
            left = room.pop(place) - size
        insort(room, left)

    @property
    def device_bytes(self) -> int:
        """What the card shows as used for it."""
        return aligned(self._roots * ROOT + aligned(self._pages * PAGE, ROOT), BATCH)
