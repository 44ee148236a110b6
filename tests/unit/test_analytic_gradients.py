"""What is done for several parameters at once is what would be done for each: gradients, a unit's first values."""

from __future__ import annotations

import pytest

from lab.analytic.accumulator import Accumulator
from lab.analytic.gradients import Kept, KeptTogether, group_at, let_go, let_go_of_list
from lab.analytic.layer_instructions import Value
from lab.analytic.segments import spelled_out
from lab.analytic.sharding.fsdp_init import Initialised
from lab.analytic.tape import FP32, FREE, Event, Trace
from lab.vocab import MemoryCategory

GRADIENTS, PASSING = MemoryCategory.GRADIENTS, MemoryCategory.TEMPORARIES
SIZES = (512, 1024, 1536)


def kept(trace: Trace) -> list[Accumulator]:
    """Block 3's, as block 1 was recorded: storages 40, 41 and 42, of parameters a, b and c."""
    values = [Value(i, n, n, GRADIENTS, f"gradient of blocks.1.{'abc'[i]}", n, 1, False) for i, n in enumerate(SIZES)]
    accumulators = [Accumulator(f"blocks.3.{name}") for name in "abc"]
    KeptTogether(trace, Kept(values, "blocks.1"), 40, "blocks.3", accumulators)
    return accumulators


def freed(trace: Trace) -> list[tuple[int, int, str]]:
    """(storage, bytes, parameter), in order."""
    events = spelled_out(trace.events, trace.segments)
    assert all(e[0] == FREE and e[3] is GRADIENTS for e in events)
    return [(e[1], e[2], e[4].removeprefix("gradient of ")) for e in events]


A, B, C = ((40 + i, n, f"blocks.3.{'abc'[i]}") for i, n in enumerate(SIZES))


@pytest.mark.parametrize("shorthand", [True, False])
def test_gradients_that_came_together_go_as_they_would_one_by_one(shorthand: bool) -> None:
    trace = Trace(512)
    trace.shorthand = shorthand
    for one_by_one in (False, True):
        for last, expected in ((None, [A, B, C]), (False, [C, B, A]), (True, [B, A])):
            trace.events.clear()
            accumulators = kept(trace)
            assert all(a.has_grad for a in accumulators)
            if one_by_one:
                assert accumulators[1].grad is accumulators[1].own
                assert group_at(accumulators, 0) is None
            if last is None:
                let_go(accumulators)
                assert freed(trace) == expected
            else:
                left = let_go_of_list(accumulators, keep_last=last)
                assert freed(trace) == expected
                del left
                assert freed(trace) == ([*expected, C] if last else expected)
            assert not any(a.has_grad or a.grad for a in accumulators)


def test_gradients_are_taken_apart_where_others_are_between_them() -> None:
    trace, other = Trace(512), Accumulator("other")
    trace.shorthand = True
    a, b, c = kept(trace)
    let_go([a, other, b])
    assert freed(trace) == [A, B]
    assert c.has_grad
    c.grad = None
    assert freed(trace) == [A, B, C]


def first_values(trace: Trace, units: list[str], itemsize: int) -> None:
    """parallel/fsdp.py, _initialise_shards, over three parameters in each unit, on two ranks."""
    value: Event | None = None
    shard: Event | None = None
    for unit in units:
        for name, numel in (("a", 7), ("b", 300), ("c", 1000)):
            drawn = trace.allocate(numel * FP32, PASSING, f"initial {unit}.{name}")
            if itemsize != FP32:
                cast = trace.allocate(numel * itemsize, PASSING, f"initial {unit}.{name}")
                trace.free(drawn)
                drawn = cast
            if value is not None:
                trace.free(value)
            value = drawn
            cut = trace.allocate(-(-numel // 2) * itemsize, PASSING, f"initial shard of {unit}.{name}")
            if shard is not None:
                trace.free(shard)
            shard = cut
    for event in (value, shard):
        assert event is not None
        trace.free(event)


@pytest.mark.parametrize("itemsize", [FP32, 2])
def test_units_get_their_first_values_as_one_loop_over_all_parameters_gives_them(itemsize: int) -> None:
    units = [f"blocks.{i}" for i in range(3)]
    expected, trace = Trace(512), Trace(512)
    first_values(expected, units, itemsize)
    trace.shorthand = True
    sizes = [(f"blocks.0.{name}", n, -(-n // 2), itemsize) for name, n in (("a", 7), ("b", 300), ("c", 1000))]
    unit, left = Initialised(trace, sizes, "blocks.0"), list[Event]()
    for block in units:
        left = unit.play(trace, block, left)
    for event in left:
        trace.free(event)
    assert spelled_out(trace.events, trace.segments) == expected.events
