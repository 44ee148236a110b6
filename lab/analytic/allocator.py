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

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from lab.analytic.driver import PRODUCTS, DriverAddresses
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


_ADDRESS = 48  # bits of an address: a free block's key is its size, then its address


class Block:
    """A piece of a segment. ``previous`` and ``next`` are its neighbours there; ``key`` its place in its pool."""

    __slots__ = ("address", "free", "key", "mapped", "next", "pool", "previous", "size")

    def __init__(
        self, address: int, size: int, pool: Pool, previous: Block | None = None, after: Block | None = None
    ) -> None:
        self.address, self.size, self.pool, self.previous, self.next = address, size, pool, previous, after
        self.free = self.mapped = True  # not mapped: address space without memory, of an expandable segment
        self.key = -1

    @property
    def small(self) -> bool:
        return self.pool.small


class Pool:
    """Free blocks of one stream and kind, smallest first, the lowest address among equals."""

    __slots__ = ("blocks", "keys", "small", "stream")

    def __init__(self, stream: int, small: bool) -> None:
        self.stream, self.small = stream, small
        self.keys: list[int] = []  # in order
        self.blocks: dict[int, Block] = {}  # by key

    def insert(self, block: Block) -> None:
        block.key = key = block.size << _ADDRESS | block.address
        insort(self.keys, key)
        self.blocks[key] = block

    def first_of(self, size: int) -> int:
        """Index of the first block of at least ``size`` bytes."""
        return bisect_left(self.keys, size << _ADDRESS)

    def take(self, index: int) -> Block:
        return self.blocks.pop(self.keys.pop(index))

    def remove(self, block: Block) -> None:
        keys, key = self.keys, block.key
        del keys[bisect_left(keys, key)], self.blocks[key]


Layout = tuple[tuple[int, tuple[int, ...]], ...]
"""Keys of the free blocks, by pool."""


@dataclass
class Allocator:
    """One process's allocator. ``limit_bytes`` caps what the driver gives (None: no cap)."""

    limit_bytes: int | None = None
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    num_retries: int = 0
    _pools: dict[int, Pool] = field(default_factory=dict)  # by twice the stream, plus 1 for small blocks
    _driver: DriverAddresses = field(default_factory=DriverAddresses)

    def malloc(self, request: int, stream: int = 0, event: int = -1) -> Block:
        """A block of at least ``request`` bytes. Raises OutOfMemory."""
        size = -(-request // MIN_BLOCK) * MIN_BLOCK or MIN_BLOCK
        small = size <= SMALL
        pool = self._pools.get(2 * stream + small) or self._pool(stream, small)
        keys = pool.keys
        i = bisect_left(keys, size << _ADDRESS)
        if i < len(keys):
            block = pool.blocks.pop(keys.pop(i))
        else:
            block = self._segment(size, pool, event)
            i = len(keys)
        rest = block.size - size
        if rest >= MIN_BLOCK if small else rest > SMALL:  # the rest is free
            after, address = block.next, block.address + size
            block.next = tail = Block(address, rest, pool, block, after)
            if after is not None:
                after.previous = tail
            block.size = size
            tail.key = key = rest << _ADDRESS | address
            insort(keys, key, 0, i)  # the block was larger, and so is what comes after it
            pool.blocks[key] = tail
        else:
            size = block.size
        block.free = False
        self.allocated_bytes += size
        return block

    def release(self, block: Block) -> None:
        """Give a block back; it joins free neighbours."""
        self.allocated_bytes -= block.size
        self.join(block)

    def join(self, block: Block) -> None:
        """Make a block free, one with its free neighbours."""
        pool, address, size = block.pool, block.address, block.size
        keys, blocks = pool.keys, pool.blocks
        before, after = block.previous, block.next
        if before is not None and before.free:
            key = before.key
            del keys[bisect_left(keys, key)], blocks[key]
            block.address = address = before.address
            size += before.size
            block.previous = before = before.previous
            if before is not None:
                before.next = block
        if after is not None and after.free:
            key = after.key
            del keys[bisect_left(keys, key)], blocks[key]
            size += after.size
            block.next = after = after.next
            if after is not None:
                after.previous = block
        block.free, block.size = True, size
        block.key = key = size << _ADDRESS | address
        insort(keys, key)
        blocks[key] = block

    def _pool(self, stream: int, small: bool) -> Pool:
        return self._pools.setdefault(2 * stream + small, Pool(stream, small))

    def _segment(self, size: int, pool: Pool, event: int) -> Block:
        total = self.check_limit(size, pool.small, event)
        self.reserved_bytes += total
        return Block(self._driver.take(total), total, pool)

    def check_limit(self, size: int, small: bool, event: int) -> int:
        """Bytes to ask the driver for; raises OutOfMemory if that is too much even with an empty cache."""
        total = SMALL_SEGMENT if small else LARGE_SEGMENT if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.limit_bytes is not None and self.reserved_bytes + total > self.limit_bytes:
            self.num_retries += 1
            self.empty_cache()
            if self.reserved_bytes + total > self.limit_bytes:
                raise OutOfMemory(event, size)
        return total

    def load_products(self) -> None:
        """The first matrix product: its library takes address space between PyTorch's segments."""
        self._driver.take(PRODUCTS)

    def layout(self) -> Layout:
        """What is free, and where: with the same live blocks, all that later requests depend on."""
        return tuple((place, tuple(pool.keys)) for place, pool in self._pools.items() if pool.keys)

    def empty_cache(self) -> None:
        """Return every segment that is one free block to the driver (release_cached_blocks)."""
        for pool in self._pools.values():
            for block in [b for b in map(pool.blocks.__getitem__, pool.keys) if b.previous is None and b.next is None]:
                pool.remove(block)
                self._driver.give(block.address, block.size)
                self.reserved_bytes -= block.size
