"""ZeRO stage 3, piece by piece: what the coordinator gathers and keeps, what a reduction allocates."""

from __future__ import annotations

from lab.analytic.accumulator import Accumulator
from lab.analytic.ops import Parameter
from lab.analytic.reduce import norm_workspace_bytes
from lab.analytic.sharding.zero3_fetch import Coordinator
from lab.analytic.sharding.zero3_gather import AVAILABLE, Gatherer, Sharded
from lab.analytic.sharding.zero3_reduce import Reducer
from lab.analytic.tape import ALLOC, BF16, Tape, Tensor, Trace
from lab.analytic.timeline import totals
from lab.config import ZeroOptions

# -- the coordinator -------------------------------------------------------------------------------


def sharded(tape: Tape, index: int, numel: int, world: int, persist: bool = False) -> Sharded:
    name = "abcdef"[index]
    parameter = Parameter(name, (numel,), Tensor(tape.new(0, BF16, "").storage, numel, BF16), Accumulator(name))
    return Sharded(parameter, index, -(-numel // world), persist)


class Model:
    """Modules a, b, c with one parameter each of 10, 21 and 31 elements, over 4 ranks."""

    def __init__(self, persist: int = 0, **options: int) -> None:
        self.tape = Tape(Trace())
        self.params = [sharded(self.tape, i, n, 4, n == persist) for i, n in enumerate((10, 21, 31))]
        members = {p.parameter.name: [p] for p in self.params}
        self.gatherer = Gatherer(self.tape, 4, 1)
        self.coordinator = Coordinator(self.gatherer, ZeroOptions(**options), members)

    def new_elements(self, start: int) -> list[tuple[str, int]]:
        return [(e[4], e[2] // BF16) for e in self.tape.trace.events[start:] if e[0] == ALLOC]

    def forward(self) -> list[tuple[str, int]]:
        """(buffer, elements) that one forward allocates."""
        start = len(self.tape.trace.events)
        self.coordinator.reset_step()
        for name in "abc":
            self.coordinator.fetch(self.coordinator.modules[name], forward=True)
            self.coordinator.release(self.coordinator.modules[name], forward=True)
        return self.new_elements(start)

    def backward(self) -> list[tuple[str, int]]:
        start = len(self.tape.trace.events)
        for name in "cba":
            self.coordinator.fetch(self.coordinator.modules[name], forward=False)
            if name != "a":  # its input needs no gradient
                self.coordinator.release(self.coordinator.modules[name], forward=False)
        self.coordinator.release_backward_leftovers()
        return self.new_elements(start)

    def alive(self) -> str:
        return "".join(p.parameter.name for p in self.params if p.status == AVAILABLE)


ONE_BY_ONE = [("gathered a", 12), ("gathered b", 24), ("gathered c", 32)]  # padded to multiples of 4


def test_first_pass_gathers_at_use_and_releases_after() -> None:
    model = Model()
    assert model.forward() == ONE_BY_ONE
    assert model.alive() == ""
    assert model.backward() == ONE_BY_ONE[::-1]
    assert model.alive() == ""


def test_later_passes_prefetch_into_one_flat_buffer_and_keep_what_is_reused() -> None:
    model = Model()
    model.forward()
    model.backward()
    prefetched = [("gathered a", 12), ("ZeRO-3 all-gather", 56), ("gathered b", 21), ("gathered c", 31)]
    for _ in range(2):
        assert model.forward() == prefetched
        assert model.alive() == "abc"
        assert model.backward() == []
        assert model.alive() == ""


def test_flat_buffer_lives_until_the_last_of_its_parameters_is_used() -> None:
    model = Model()
    model.forward()
    model.backward()
    model.coordinator.reset_step()
    sizes = []
    for name in "abc":
        model.coordinator.fetch(model.coordinator.modules[name], forward=True)
        sizes.append(totals(model.tape.trace.events)[-1] // BF16)
    assert sizes == [12 + 56, 12 + 56 + 21 + 31, 12 + 21 + 31]


def test_prefetch_stops_at_the_bucket_and_at_live_parameters() -> None:
    model = Model(stage3_prefetch_bucket_size=21)
    model.forward()
    model.backward()
    assert model.forward() == ONE_BY_ONE  # b alone reaches 21 elements, so c is left to b's prefetch
    model = Model(stage3_max_live_parameters=10)
    model.forward()
    model.backward()
    assert model.forward() == ONE_BY_ONE
    assert model.alive() == "abc"  # it limits the prefetch only


def test_reuse_distance_counts_the_elements_in_between() -> None:
    """After a's forward come b, c, c, b, a: 21 + 31 + 31 + 21 elements before a is reached; after c's, c at once."""
    for distance, kept in ((0, ""), (1, "c"), (31 + 31, "c"), (31 + 31 + 1, "bc"), (104, "bc"), (105, "abc")):
        model = Model(stage3_max_reuse_distance=distance, stage3_prefetch_bucket_size=1)
        model.forward()
        model.backward()
        model.forward()
        assert model.alive() == kept


def test_persistent_parameters_are_released_for_the_optimizer_step_only() -> None:
    model = Model(persist=21)
    model.forward()
    model.backward()
    assert model.alive() == ""  # the first pass knows no persistence
    model.gatherer.all_gather(model.params[1:2])
    model.forward()
    model.backward()
    assert model.alive() == "b"
    model.coordinator.release_and_reset_all()
    assert model.alive() == ""


# -- reductions ------------------------------------------------------------------------------------


def reductions(sizes: list[int], world: int = 2, rank: int = 0, **options: object) -> list[tuple[str, int]]:
    """(buffer, elements) that reducing gradients of these sizes allocates, in a bucket of 100 elements."""
    tape = Tape(Trace())
    reducer = Reducer(tape, ZeroOptions(reduce_bucket_size=100, **options), world, rank, BF16)  # type: ignore[arg-type]
    params = [sharded(tape, i, n, world) for i, n in enumerate(sizes)]
    for p in params:
        p.parameter.accumulator.grad = tape.new(p.numel, BF16, "gradient")
        reducer.add(p)
    reducer.reduce()
    assert all(p.parameter.accumulator.grad is None for p in params)
    return [(e[4], e[2] // BF16) for e in tape.trace.events if e[0] == ALLOC and e[4] != "gradient"]


def test_a_full_bucket_is_reduced_before_the_next_gradient() -> None:
    bucket, flat = ("ZeRO-3 reduce bucket", 100), "ZeRO-3 reduce-scatter"
    assert reductions([60, 30, 40, 20]) == [bucket, (flat, 90), (flat, 60)]
    assert reductions([60, 150, 40, 20]) == [bucket, (flat, 60)]  # 60 and 150 alone: reduced where they are
    assert reductions([60, 30, 40, 20], contiguous_gradients=False) == [(flat, 90), (flat, 60)]


def test_padding_of_shards_in_the_flat_buffer() -> None:
    """Over 4 ranks 10 elements are 3 + 3 + 3 + 1 (2 short) and 9 are 3 + 3 + 3 + 0 (3 short)."""
    assert reductions([10, 9], world=4)[1:] == [("padding", 2), ("padding", 3), ("ZeRO-3 reduce-scatter", 24)]
    assert reductions([8], world=4)[1:] == []


def test_all_reduce_copies_the_bucket_and_pads_short_ranks() -> None:
    for rank, padded in ((0, []), (3, [("padded gradient shard", 3), ("padded gradient shard", 3)])):
        got = reductions([10, 9, 8], world=4, rank=rank, reduce_scatter=False)
        assert got[1:] == [("averaged bucket", 27), *padded]


def test_partial_sums_of_a_norm() -> None:
    """An H200 takes 0, 512, 512, 1024 and 4608 B for norms of so many fp64 elements, and 512 B for a semaphore."""
    got = [norm_workspace_bytes(n, 132) for n in (256, 131072, 360448, 1024000, 19_316_736)]
    assert got == [0, 8 * 16, 8 * 44, 8 * 125, 8 * 4 * 132]
