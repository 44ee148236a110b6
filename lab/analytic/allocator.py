"""PyTorch's CUDA caching allocator over a list of events (c10/cuda/CUDACachingAllocator.cpp).

Default settings: no max_split_size, no size divisions, no garbage collection threshold, ``expandable_segments``
off (on: lab/analytic/expandable.py). Sizes are in bytes. What it decides here:

- a request is rounded up to 512 B; up to 1 MiB it comes from the small pool, else from the large one;
- the smallest free block of its stream that fits is taken, the lowest address among equals;
- the rest is split off if it is at least 512 B (small pool) or more than 1 MiB (large pool); otherwise the
  whole block is handed out, and *allocated* grows by the block, not by the request;
- without a block a segment is taken from the driver: 2 MiB for the small pool, 20 MiB for requests under
  10 MiB, else the request rounded up to 2 MiB;
- a freed block joins its free neighbours in the segment.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from lab.analytic.driver import DriverAddresses
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


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment. ``previous`` and ``next`` are its neighbours there."""

    address: int
    size: int
    stream: int
    small: bool
    free: bool = True
    previous: Block | None = None
    next: Block | None = None
    mapped: bool = True  # False: address space without memory, of an expandable segment


_ADDRESS = 48  # bits of an address: a free block's key is its size, then its address


@dataclass(slots=True)
class Pool:
    """Free blocks of one stream and kind, smallest first, the lowest address among equals."""

    keys: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def insert(self, block: Block) -> None:
        key = block.size << _ADDRESS | block.address
        i = bisect_left(self.keys, key)
        self.keys.insert(i, key)
        self.blocks.insert(i, block)

    def first_of(self, size: int) -> int:
        """Index of the first block of at least ``size`` bytes."""
        return bisect_left(self.keys, size << _ADDRESS)

    def take(self, index: int) -> Block:
        del self.keys[index]
        return self.blocks.pop(index)

    def remove(self, block: Block) -> None:
        i = bisect_left(self.keys, block.size << _ADDRESS | block.address)
        del self.keys[i], self.blocks[i]


Layout = tuple[tuple[tuple[int, bool], tuple[int, ...]], ...]
"""Keys of the free blocks, by stream and "small"."""


@dataclass
class Allocator:
    """One process's allocator. ``limit_bytes`` caps what the driver gives (None: no cap)."""

    limit_bytes: int | None = None
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    num_retries: int = 0
    _pools: dict[tuple[int, bool], Pool] = field(default_factory=dict)  # by stream and "small"
    _driver: DriverAddresses = field(default_factory=DriverAddresses)

    def malloc(self, request: int, stream: int = 0, event: int = -1) -> Block:
        """A block of at least ``request`` bytes. Raises OutOfMemory."""
        size = -(-request // MIN_BLOCK) * MIN_BLOCK or MIN_BLOCK
        small = size <= SMALL
        pool = self._pool(stream, small)
        keys = pool.keys
        i = bisect_left(keys, size << _ADDRESS)
        if i < len(keys):
            del keys[i]
            block = pool.blocks.pop(i)
        else:
            block = self._segment(size, stream, small, event)
        rest = block.size - size
        if rest >= MIN_BLOCK if small else rest > SMALL:
            self._split(block, size)
        block.free = False
        self.allocated_bytes += block.size
        return block

    def _split(self, block: Block, size: int) -> None:
        """Cut a block to ``size``; the rest is free."""
        after = block.next
        tail = Block(block.address + size, block.size - size, block.stream, block.small, True, block, after)
        if after is not None:
            after.previous = tail
        block.next = tail
        block.size = size
        self._pool(block.stream, block.small).insert(tail)

    def release(self, block: Block) -> None:
        """Give a block back; it joins free neighbours."""
        self.allocated_bytes -= block.size
        self.join(block)

    def join(self, block: Block) -> None:
        """Make a block free, one with its free neighbours."""
        block.free = True
        pool = self._pool(block.stream, block.small)
        before, after = block.previous, block.next
        if before is not None and before.free:
            pool.remove(before)
            block.address, block.previous = before.address, before.previous
            if block.previous is not None:
                block.previous.next = block
            block.size += before.size
        if after is not None and after.free:
            pool.remove(after)
            block.next = after.next
            if block.next is not None:
                block.next.previous = block
            block.size += after.size
        pool.insert(block)

    def _pool(self, stream: int, small: bool) -> Pool:
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = Pool()
        return pool

    def _segment(self, size: int, stream: int, small: bool, event: int) -> Block:
        total = self.check_limit(size, small, event)
        self.reserved_bytes += total
        return Block(self._driver.take(total), total, stream, small)

    def check_limit(self, size: int, small: bool, event: int) -> int:
        """Bytes to ask the driver for; raises OutOfMemory if that is too much even with an empty cache."""
        total = SMALL_SEGMENT if small else LARGE_SEGMENT if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.limit_bytes is not None and self.reserved_bytes + total > self.limit_bytes:
            self.num_retries += 1
            self.empty_cache()
            if self.reserved_bytes + total > self.limit_bytes:
                raise OutOfMemory(event, size)
        return total

    def layout(self) -> Layout:
        """What is free, and where: with the same live blocks, all that later requests depend on."""
        return tuple((place, tuple(pool.keys)) for place, pool in self._pools.items() if pool.keys)

    def empty_cache(self) -> None:
        """Return every segment that is one free block to the driver (release_cached_blocks)."""
        for pool in self._pools.values():
            for block in [b for b in pool.blocks if b.previous is None and b.next is None]:
                pool.remove(block)
                self._driver.give(block.address, block.size)
                self.reserved_bytes -= block.size
