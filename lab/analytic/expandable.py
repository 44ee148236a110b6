"""The caching allocator with ``expandable_segments:True``: one growing segment per stream and pool.

c10/cuda/CUDACachingAllocator.cpp (get_free_block, try_allocate_expandable_block, find_expandable_block, map_block,
unmap_block). A pool reserves more address space than the GPU has memory and maps it from the bottom, 2 MiB at a time in
the small pool and 20 MiB in the large one; *reserved* counts what is mapped. A request that no free block holds goes to
the lowest place where a free block and unmapped space behind it are large enough together. Every rest of 512 B and more
is split off, in the large pool too. Emptying the cache unmaps whole pieces inside free blocks.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from lab.analytic.allocator import LARGE_SEGMENT, MIN_BLOCK, SMALL, SMALL_SEGMENT, Allocator, Block, Pool
from lab.config import RunConfig

SPACE = 1 << 44  # bytes of address space; PyTorch takes 9/8 of the GPU's memory, more than can be mapped


@dataclass
class ExpandableAllocator(Allocator):
    """Addresses count from 0 in each pool: blocks of two pools are never compared."""

    _unmapped: dict[Pool, list[Block]] = field(default_factory=dict)  # by address

    def malloc(self, request: int, stream: int = 0, event: int = -1) -> Block:
        """A block of at least ``request`` bytes. Raises OutOfMemory."""
        size = -(-request // MIN_BLOCK) * MIN_BLOCK or MIN_BLOCK
        pool = self._pool(stream, size <= SMALL)
        block = self._fitting(pool, size) or self._expand(size, pool, event)
        if block.size - size >= MIN_BLOCK:
            self._split(block, size)
        block.free = False
        self.allocated_bytes += block.size
        return block

    def _split(self, block: Block, size: int) -> None:
        """Cut a block to ``size``; the rest is free."""
        after, pool = block.next, block.pool
        block.next = tail = Block(block.address + size, block.size - size, pool, block, after)
        if after is not None:
            after.previous = tail
        block.size = size
        pool.insert(tail)

    def _fitting(self, pool: Pool, size: int) -> Block | None:
        """The smallest free block that fits, where one before unmapped space counts with all that it could become."""
        i, keys, blocks = pool.first_of(size), pool.keys, pool.blocks
        if i == len(keys):
            return None
        while (
            _is_split(blocks[keys[i]])
            and i + 1 < len(keys)
            and _could_be(blocks[keys[i + 1]]) < _could_be(blocks[keys[i]])
        ):
            i += 1
        return pool.take(i)

    def _expand(self, size: int, pool: Pool, event: int) -> Block:
        self.check_limit(size, pool.small, event)
        block = self._room(size, pool)
        if not block.mapped:
            block = self._map(block, min(size, block.size))
        while block.size < size:
            assert block.next is not None
            block = self._map(block.next, min(size - block.size, block.next.size))
        pool.remove(block)
        return block

    def _room(self, size: int, pool: Pool) -> Block:
        """The lowest free or unmapped block from which on there is room: unmapped space and what is free around it."""
        unmapped = self._unmapped.setdefault(pool, [])
        for block in unmapped:
            first = block.previous if block.previous is not None and block.previous.free else block
            found = 0
            at: Block | None = first
            while found < size and at is not None and (at.free or not at.mapped):
                found += at.size
                at = at.next
            if found >= size:
                return first
        space = Block(0, SPACE, pool)
        space.free = space.mapped = False
        unmapped.append(space)
        return space

    def _map(self, block: Block, size: int) -> Block:
        """Map at least ``size`` bytes at the start of an unmapped block; it joins the free blocks around it."""
        piece = SMALL_SEGMENT if block.small else LARGE_SEGMENT
        mapped = -(-size // piece) * piece
        unmapped = self._unmapped[block.pool]
        unmapped.remove(block)
        if mapped < block.size:
            rest = Block(block.address + mapped, block.size - mapped, block.pool, block, block.next)
            rest.free = rest.mapped = False
            if block.next is not None:
                block.next.previous = rest
            block.next, block.size = rest, mapped
            insort(unmapped, rest, key=lambda b: b.address)
        block.mapped = True
        self.reserved_bytes += mapped
        self.join(block)
        return block

    def empty_cache(self) -> None:
        """Unmap every whole piece inside free blocks (release_blocks, unmap_block)."""
        for pool in self._pools.values():
            piece = SMALL_SEGMENT if pool.small else LARGE_SEGMENT
            for block in [pool.blocks[key] for key in pool.keys]:
                start, end = -(-block.address // piece) * piece, (block.address + block.size) // piece * piece
                if start < end:
                    self._unmap(block, start, end, self._unmapped[pool])

    def _unmap(self, block: Block, start: int, end: int, unmapped: list[Block]) -> None:
        pool = block.pool
        pool.remove(block)
        if block.address < start:
            before = Block(block.address, start - block.address, pool, block.previous, block)
            if block.previous is not None:
                block.previous.next = before
            block.previous = before
            pool.insert(before)
        if end < block.address + block.size:
            size = block.address + block.size - end
            after = Block(end, size, pool, block, block.next)
            if block.next is not None:
                block.next.previous = after
            block.next = after
            pool.insert(after)
        block.address, block.size, block.free, block.mapped = start, end - start, False, False
        self.reserved_bytes -= block.size
        before_it, after_it = block.previous, block.next
        if before_it is not None and not before_it.mapped:
            unmapped.remove(before_it)
            block.address, block.previous = before_it.address, before_it.previous
            block.size += before_it.size
            if block.previous is not None:
                block.previous.next = block
        if after_it is not None and not after_it.mapped:
            unmapped.remove(after_it)
            block.next = after_it.next
            block.size += after_it.size
            if block.next is not None:
                block.next.previous = block
        insort(unmapped, block, key=lambda b: b.address)


def _is_split(block: Block) -> bool:
    return block.previous is not None or block.next is not None


def _could_be(block: Block) -> int:
    """expandable_size: with the unmapped space right behind it."""
    behind = block.next
    return block.size + (behind.size if behind is not None and not behind.mapped else 0)


def allocator_of(cfg: RunConfig) -> type[Allocator]:
    """The allocator that the run's settings ask for."""
    return ExpandableAllocator if cfg.train.expandable_segments else Allocator
