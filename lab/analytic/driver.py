"""Where the CUDA driver puts a segment: it decides ties between free blocks of one size.

``get_free_block`` takes the lowest address among equals, so the order of segments' addresses matters, not the
addresses. The driver's rule, as read off the addresses in seven allocator traces of real runs (H200, driver
580.159, CUDA 13.0; tests/unit/data/allocator_trace_*.json.gz are two of them): address space is reserved in
chunks of whole 32 MiB, each below the last; a request goes to the lowest hole that is large enough. A new
context has a hole of 414 MiB and, above it, one of 20 MiB; the first small segment lies between them. The first
matrix product loads cuBLAS and kernels: 64 to 76 MiB are missing before its workspace in twelve traces of drawn shapes
(experiments/h200_blind7 and 8), 74 or 76 where no attention kernel had been tried before; of those, 76 was chosen by
the recorded runs, which it fits better than 64 or 74. Left out: some MiB that other
kernels take as they are loaded, and NCCL's memory.
"""

from __future__ import annotations

from bisect import insort

from lab.units import MIB

CHUNK = 32 * MIB
ARENA = 414 * MIB
UPPER_HOLE = 20 * MIB
PRODUCTS = 76 * MIB  # cuBLAS and its kernels
BASE = 1 << 46  # where the arena starts; chunks grow down from there


class DriverAddresses:
    """Address space of one process: ``take`` and ``give`` segments."""

    def __init__(self) -> None:
        self._holes: list[tuple[int, int]] = [(BASE, ARENA), (BASE + 2 * ARENA, UPPER_HOLE)]
        self._next_chunk = BASE
        self._first = True
        self._too_large = 1 << 62  # no hole holds a request of this size or more

    def take(self, size: int) -> int:
        """Address of a new segment of ``size`` bytes."""
        if self._first:
            self._first = False
            return BASE + ARENA
        for i, (start, length) in enumerate(self._holes if size < self._too_large else ()):
            if length >= size:
                if length == size:
                    del self._holes[i]
                else:
                    self._holes[i] = (start + size, length - size)
                return start
        self._too_large = min(self._too_large, size)
        chunk = -(-size // CHUNK) * CHUNK
        self._next_chunk -= chunk
        if chunk > size:
            self._add(self._next_chunk + size, chunk - size)
        return self._next_chunk

    def _add(self, start: int, length: int) -> None:
        insort(self._holes, (start, length))
        self._too_large = max(self._too_large, length + 1)

    def give(self, address: int, size: int) -> None:
        """A segment went back to the driver: its address space is a hole again, joined with its neighbours."""
        self._add(address, size)
        joined: list[tuple[int, int]] = []
        for start, length in self._holes:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((start, length))
        self._holes = joined
        self._too_large = max(length for _, length in joined) + 1
