"""The caching allocator's rules, each on a case that can be followed by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lab.analytic.allocator import Allocator, OutOfMemory
from lab.analytic.layers import replay_steps
from lab.analytic.simulation import Simulation, settle, simulate
from lab.analytic.tape import ALLOC, FREE, IN_USE, Event
from lab.config import load
from lab.units import MIB

DATA = Path(__file__).parent / "data"


def test_small_requests_share_a_2_mib_segment() -> None:
    a = Allocator()
    a.malloc(1)
    a.malloc(513)
    assert a.allocated_bytes == 512 + 1024
    assert a.reserved_bytes == 2 * MIB


def test_requests_from_1_to_10_mib_share_a_20_mib_segment() -> None:
    a = Allocator()
    a.malloc(MIB + 1)
    a.malloc(9 * MIB)
    assert a.reserved_bytes == 20 * MIB
    a.malloc(12 * MIB + 1)
    assert a.reserved_bytes == 20 * MIB + 14 * MIB


def test_a_rest_of_up_to_1_mib_is_handed_out_with_the_block() -> None:
    a = Allocator()
    a.release(a.malloc(12 * MIB))
    a.malloc(11 * MIB)  # 1 MiB left: not split
    assert a.allocated_bytes == 12 * MIB
    a = Allocator()
    a.release(a.malloc(12 * MIB))
    a.malloc(11 * MIB - 512)
    assert a.allocated_bytes == 11 * MIB - 512


def test_best_fit_takes_the_smallest_block_and_the_lowest_address() -> None:
    a = Allocator()
    blocks = [a.malloc(size * MIB) for size in (30, 20, 24, 20)]
    for b in blocks:
        a.release(b)
    assert a.malloc(20 * MIB).address == blocks[1].address
    assert a.malloc(20 * MIB).address == blocks[3].address
    assert a.malloc(20 * MIB).address == blocks[2].address


def test_the_first_product_takes_address_space() -> None:
    """Of two free blocks of one size the lower one goes out first: which that is, a gap in the first arena decides."""
    order = []
    for products in (False, True):
        a = Allocator()
        a.malloc(1)  # the small segment above the arena
        held = [a.malloc(100 * MIB) for _ in range(3)]
        if products:
            a.load_products()
        held += [a.malloc(100 * MIB) for _ in range(2)]
        order.append([b.address > held[0].address for b in held])
    assert order == [[False, True, True, True, False], [False, True, True, False, False]]


def test_freed_neighbours_join() -> None:
    a = Allocator()
    x, y, z = (a.malloc(4 * MIB) for _ in range(3))
    first = x.address
    a.release(x)
    a.release(z)
    a.release(y)
    assert a.malloc(9 * MIB).address == first
    assert a.reserved_bytes == 20 * MIB
    assert a.allocated_bytes == 9 * MIB


def test_streams_do_not_share_blocks() -> None:
    a = Allocator()
    a.release(a.malloc(16 * MIB, stream=0))
    a.malloc(16 * MIB, stream=1)
    assert a.reserved_bytes == 32 * MIB


def test_unused_segments_are_returned_before_running_out() -> None:
    a = Allocator(limit_bytes=40 * MIB)
    a.release(a.malloc(30 * MIB))
    a.malloc(32 * MIB)  # does not fit the cached 30 MiB: that segment goes back first
    assert (a.num_retries, a.reserved_bytes) == (1, 32 * MIB)
    with pytest.raises(OutOfMemory):
        a.malloc(10 * MIB)


def test_a_block_that_another_stream_uses_comes_back_after_the_next_allocation() -> None:
    """It is not allocated any more, and not there for the next request either; the one after that has it."""

    def size(kind: int, ident: int, stream: int) -> Event:
        return kind, ident, 40 * MIB, "", "", stream

    taken = [size(ALLOC, 0, 1), size(FREE, 0, IN_USE), size(ALLOC, 1, 0), size(ALLOC, 2, 1), size(ALLOC, 3, 1)]
    run = simulate(taken, 4)
    assert [n // MIB for n in run.allocated] == [40, 0, 40, 80, 120]
    assert [n // MIB for n in run.reserved] == [40, 40, 80, 120, 120]
    assert simulate(taken[:4], 3, 80 * MIB).reserved[-1] == 80 * MIB  # rather than run out it waits for the block
    done = simulate([taken[0], size(FREE, 0, 0), *taken[2:]], 4)
    assert [n // MIB for n in done.reserved] == [40, 40, 80, 80, 120]


def test_simulation_reports_blocks_and_reserved_bytes_per_event() -> None:
    events: list[Event] = [
        (ALLOC, 0, 12 * MIB, "activations", "a", 0),
        (FREE, 0, 0, "", "", 0),
        (ALLOC, 1, 11 * MIB, "activations", "b", 0),
    ]
    done = simulate(events, 2)
    assert done.block_bytes == [12 * MIB, 12 * MIB]
    assert done.reserved == [12 * MIB] * 3


@pytest.mark.parametrize("name", ["ck1b", "fsdp"])
def test_a_real_trace_is_reproduced_exactly(name: str) -> None:
    """Every request and free of a real run (1b checkpointed in fp32; 125m under FSDP2 with three streams), in order.

    Allocated and reserved bytes must be PyTorch's own after every event: blocks, splits, ties and segments.
    """
    trace = json.loads(gzip.decompress((DATA / f"allocator_trace_{name}.json.gz").read_bytes()))
    allocator, live, segments = Allocator(), {}, 0
    for kind, address, size, stream in trace["events"]:
        if kind == "s":
            segments += size
        elif kind == "a":
            live[address] = allocator.malloc(size, stream)
            assert allocator.reserved_bytes == segments
        elif kind == "f":
            allocator.release(live.pop(address))
    assert allocator.reserved_bytes == trace["reserved_bytes"]
    assert allocator.allocated_bytes == trace["allocated_bytes"]


def test_steps_are_taken_until_the_free_blocks_repeat() -> None:
    """FSDP2 with 16 sequences asks the driver in its fourth step still, as it did on two H200s (16322 MiB reserved)."""
    base = ["model=1b", "parallel=fsdp", "world_size=2", "checkpointing=full", "loss=chunked", "hardware=h200"]
    reserved, steps = {}, {}
    for given in (2, 3, 6, 100):
        shape = ["train.micro_batch_size=16", "train.seq_len=2048", f"train.steps={given}"]
        replay, simulation = replay_steps(load([*base, *shape]), 0), Simulation(Allocator())
        settle(replay, simulation)
        reserved[given], steps[given] = simulation.reserved[-1] // MIB, replay.done
    assert reserved == {2: 15618, 3: 15970, 6: 16322, 100: 16322}
    assert steps == {2: 2, 3: 3, 6: 5, 100: 5}
