"""CUDA managed memory on the GPU, where bitsandbytes keeps paged optimizer states.

The driver fills it in pages of 64 KiB, cut from root chunks of 2 MiB, and takes those from the card 1 <<
uvm_perf_pma_batch_nonpinned_order (6) at a time. Source: open-gpu-kernel-modules, kernel-open/nvidia-uvm/uvm_pmm_gpu.c.
"""

from __future__ import annotations

from lab.analytic.tape import aligned

PAGE = 64 << 10
ROOT = 2 << 20
BATCH = 64 * ROOT
ALIGNMENT = 256  # bytes; of every CUDA allocation (CUDA C++ Programming Guide, Device Memory Accesses)


class ManagedMemory:
    """Room on the GPU for what cudaMallocManaged gives, all of it touched there.

    Allocations up to 1 MiB share blocks of 2 MiB, each filled as a whole; up to 2 MiB they have a block each; larger
    ones take their pages. Measured on an H200, driver 580.159, by experiments/optimizers/managed_memory.py.
    """

    def __init__(self) -> None:
        self.requested_bytes = 0
        self._pages = 0
        self._free = 0  # bytes at the end of the last shared block

    def take(self, nbytes: int) -> None:
        """One allocation."""
        self.requested_bytes += nbytes
        size = aligned(nbytes, ALIGNMENT)
        if nbytes > ROOT:
            self._pages += -(-nbytes // PAGE)
        elif nbytes > ROOT // 2:
            self._pages += ROOT // PAGE
        elif size <= self._free:
            self._free -= size
        else:
            self._pages += ROOT // PAGE
            self._free = ROOT - size

    @property
    def device_bytes(self) -> int:
        """What the card shows as used for it."""
        return aligned(self._pages * PAGE, BATCH)
