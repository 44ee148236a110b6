"""expandable_segments:True by hand: mapped pieces, growth in place, the free block taken, what a full GPU unmaps."""

from __future__ import annotations

import random

import pytest

from lab.analytic import predict
from lab.analytic.allocator import Allocator, Block, OutOfMemory
from lab.analytic.expandable import ExpandableAllocator
from lab.config import ConfigError, load
from lab.units import MIB


def test_pieces_of_2_and_20_mib_are_mapped() -> None:
    allocator = ExpandableAllocator()
    allocator.malloc(1000)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == 42 * MIB
    allocator.malloc(15 * MIB)  # 10 MiB are left of the second piece, 5 more come from a third
    assert allocator.reserved_bytes == 62 * MIB
    allocator.malloc(15 * MIB)
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (62 * MIB, 1024 + 60 * MIB)


def test_a_larger_request_grows_the_hole_where_the_default_takes_a_new_segment() -> None:
    for kind, reserved in ((ExpandableAllocator, 60), (Allocator, 80)):
        allocator = kind()
        allocator.release(allocator.malloc(30 * MIB))
        allocator.malloc(50 * MIB)
        assert allocator.reserved_bytes == reserved * MIB


def test_streams_have_segments_of_their_own() -> None:
    allocator = ExpandableAllocator()
    allocator.release(allocator.malloc(5 * MIB, stream=0))
    allocator.malloc(5 * MIB, stream=1)
    assert allocator.reserved_bytes == 40 * MIB


def test_the_block_before_unmapped_space_is_taken_last() -> None:
    """Best fit counts it with all that it could become: of 8 and 5 MiB free, a request of 4 goes to the 8."""
    allocator = ExpandableAllocator()
    low = allocator.malloc(8 * MIB)
    allocator.malloc(7 * MIB)  # 5 MiB are left at the end of the piece
    address = low.address
    allocator.release(low)
    assert allocator.malloc(4 * MIB).address == address


def test_rests_are_split_off_in_the_large_pool_too() -> None:
    allocator = ExpandableAllocator()
    block = allocator.malloc(20 * MIB - 512)
    assert (block.size, allocator.malloc(1).size) == (20 * MIB - 512, 512)
    default = Allocator()
    assert default.malloc(20 * MIB - 512).size == 20 * MIB


def test_a_full_gpu_unmaps_whole_pieces_and_asks_again() -> None:
    allocator = ExpandableAllocator(limit_bytes=80 * MIB)
    first = allocator.malloc(50 * MIB)
    allocator.malloc(5 * MIB)  # 60 are mapped
    allocator.release(first)
    allocator.malloc(60 * MIB)  # 60 more would be 120: the two whole pieces in the hole go back, 20 stay mapped
    assert allocator.num_retries == 1
    assert allocator.reserved_bytes == 80 * MIB
    with pytest.raises(OutOfMemory):
        allocator.malloc(40 * MIB)


def test_no_block_overlaps_another_and_all_bytes_are_counted() -> None:
    rng = random.Random(0)
    allocator = ExpandableAllocator()
    live: list[Block] = []
    for _ in range(3000):
        if live and rng.random() < 0.5:
            allocator.release(live.pop(rng.randrange(len(live))))
        else:
            live.append(allocator.malloc(rng.choice([100, 5000, 3 * MIB, 17 * MIB + 3, 64 * MIB])))
        if rng.random() < 0.01:
            allocator.empty_cache()
    assert allocator.allocated_bytes == sum(b.size for b in live)
    total = 0
    for small in (True, False):
        block: Block | None = next(b for b in live if b.small is small)
        while block is not None and block.previous is not None:
            block = block.previous
        mapped, end, used = 0, 0, set()
        while block is not None:
            assert block.address == end
            end = block.address + block.size
            mapped += block.size if block.mapped else 0
            if block.mapped and not block.free:
                used.add(id(block))
            block = block.next
        assert mapped % ((2 if small else 20) * MIB) == 0
        assert used == {id(b) for b in live if b.small is small}
        total += mapped
    assert total == allocator.reserved_bytes


def test_a_prediction_with_it_reserves_less() -> None:
    base = ["model=350m", "hardware=h200", "train.micro_batch_size=4", "train.seq_len=1000", "checkpointing=full"]
    default, expandable = (predict(load([*base, f"train.expandable_segments={flag}"])) for flag in (False, True))
    assert expandable.steady.reserved_bytes < default.steady.reserved_bytes
    assert expandable.steady.allocated_bytes <= default.steady.allocated_bytes
    assert any("expandable segments" in text for text in expandable.assumptions)


def test_it_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="needs a GPU: it is a setting of PyTorch's CUDA allocator"):
        load(["model=tiny", "hardware=cpu", "train.expandable_segments=true"])
