"""PyTorch's CUDA caching allocator over a list of events (c10/cuda/CUDACachingAllocator.cpp).

Default settings: no max_split_size, no size divisions, no garbage collection threshold,
``expandable_segments`` off. Sizes are in bytes. What it decides here:

- a request is rounded up to 512 B; up to 1 MiB it comes from the small pool, else from the large one;
- the smallest free block of its stream that fits is taken, the lowest address among equals;
- the rest is split off if it is at least 512 B (small pool) or more than 1 MiB (large pool); otherwise the
  whole block is handed out, and *allocated* grows by the block, not by the request;
- without a block a segment is taken from the driver: 2 MiB for the small pool, 20 MiB for requests under
  10 MiB, else the request rounded up to 2 MiB;
- a freed block joins its free neighbours in the segment.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from lab.analytic.driver import DriverAddresses
from lab.analytic.tape import ALLOC, EMPTY_CACHE, FREE, Event
from lab.units import MIB

MIN_BLOCK = 512
SMALL = MIB  # kSmallSize
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer
MIN_LARGE = 10 * MIB  # kMinLargeAlloc
ROUND_LARGE = 2 * MIB  # kRoundLarge


class OutOfMemory(Exception):
    """The driver has no room for the next segment, even after all unused segments were returned."""

    def __init__(self, event: int, request_bytes: int) -> None:
        super().__init__(f"out of memory at event {event}: {request_bytes} B")
        self.event, self.request_bytes = event, request_bytes


@dataclass(slots=True)
class Block:
    """A piece of a segment. ``previous`` and ``next`` are its neighbours there."""

    address: int
    size: int
    stream: int
    small: bool
    free: bool = True
    previous: Block | None = None
    next: Block | None = None


Key = tuple[int, int, int]  # stream, size, address


@dataclass
class Allocator:
    """One process's allocator. ``limit_bytes`` caps what the driver gives (None: no cap)."""

    limit_bytes: int | None = None
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    num_retries: int = 0
    _pools: tuple[list[Key], list[Key]] = field(default_factory=lambda: ([], []))
    _blocks: dict[int, Block] = field(default_factory=dict)  # free blocks by address
    _driver: DriverAddresses = field(default_factory=DriverAddresses)

    def malloc(self, request: int, stream: int = 0, event: int = -1) -> Block:
        """A block of at least ``request`` bytes. Raises OutOfMemory."""
        size = max(-(-request // MIN_BLOCK) * MIN_BLOCK, MIN_BLOCK)
        small = size <= SMALL
        pool = self._pools[small]
        i = bisect_left(pool, (stream, size, -1))
        if i < len(pool) and pool[i][0] == stream:
            block = self._blocks.pop(pool.pop(i)[2])
        else:
            block = self._segment(size, stream, small, event)
        rest = block.size - size
        if rest >= MIN_BLOCK if small else rest > SMALL:
            tail = Block(block.address + size, rest, stream, small, True, block, block.next)
            if block.next is not None:
                block.next.previous = tail
            block.next = tail
            block.size = size
            self._insert(tail)
        block.free = False
        self.allocated_bytes += block.size
        return block

    def release(self, block: Block) -> None:
        """Give a block back; it joins free neighbours."""
        self.allocated_bytes -= block.size
        block.free = True
        for other in (block.previous, block.next):
            if other is None or not other.free:
                continue
            self._remove(other)
            if other is block.previous:
                block.address, block.previous = other.address, other.previous
                if block.previous is not None:
                    block.previous.next = block
            else:
                block.next = other.next
                if block.next is not None:
                    block.next.previous = block
            block.size += other.size
        self._insert(block)

    def _segment(self, size: int, stream: int, small: bool, event: int) -> Block:
        total = SMALL_SEGMENT if small else LARGE_SEGMENT if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.limit_bytes is not None and self.reserved_bytes + total > self.limit_bytes:
            self.num_retries += 1
            self.empty_cache()
            if self.reserved_bytes + total > self.limit_bytes:
                raise OutOfMemory(event, size)
        self.reserved_bytes += total
        return Block(self._driver.take(total), total, stream, small)

    def empty_cache(self) -> None:
        """Return every segment that is one free block to the driver (release_cached_blocks)."""
        for block in [b for b in self._blocks.values() if b.previous is None and b.next is None]:
            self._remove(block)
            self._driver.give(block.address, block.size)
            self.reserved_bytes -= block.size

    def _insert(self, block: Block) -> None:
        self._blocks[block.address] = block
        insort(self._pools[block.small], (block.stream, block.size, block.address))

    def _remove(self, block: Block) -> None:
        pool = self._pools[block.small]
        del pool[bisect_left(pool, (block.stream, block.size, block.address))]
        del self._blocks[block.address]


@dataclass
class Simulation:
    """What the allocator did with the events: block bytes by storage id, and reserved bytes after each event."""

    block_bytes: list[int]
    reserved: list[int]
    allocator: Allocator


def simulate(events: Sequence[Event], num_storages: int, limit_bytes: int | None = None) -> Simulation:
    """Serve the events in order. Raises OutOfMemory beyond ``limit_bytes``."""
    allocator = Allocator(limit_bytes)
    live: dict[int, Block] = {}
    block_bytes, reserved = [0] * num_storages, []
    for i, event in enumerate(events):
        if event[0] == ALLOC:
            block = allocator.malloc(event[2], event[5], i)
            live[event[1]] = block
            block_bytes[event[1]] = block.size
        elif event[0] == FREE:
            allocator.release(live.pop(event[1]))
        elif event[0] == EMPTY_CACHE:
            allocator.empty_cache()
        reserved.append(allocator.reserved_bytes)
    return Simulation(block_bytes, reserved, allocator)
