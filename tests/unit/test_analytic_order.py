"""The replay allocates and frees the same large blocks in the same order as a real run on an H200 (torch 2.11).

Each file holds the blocks above 1 MiB of one allocator trace: a number is an allocation of so many times 512 B, -1 - n
frees the n-th allocation. Frees between two allocations are sorted: their order changes nothing.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lab.analytic.ops import Ops, Parameter
from lab.analytic.step import Replay
from lab.analytic.tape import ALLOC, FREE, Accumulator, Event, Tape, Tensor, Trace
from lab.config import load
from lab.units import MIB
from lab.vocab import MemoryCategory

DATA = Path(__file__).parent / "data"


def large_blocks(events: list[Event]) -> list[int]:
    ordinal: dict[int, int] = {}
    out: list[int] = []
    freed: list[int] = []
    for kind, ident, nbytes, *_ in events:
        if kind == ALLOC and nbytes > MIB:
            out += sorted(freed, reverse=True)
            freed = []
            ordinal[ident] = len(ordinal)
            out.append(nbytes // 512)
        elif kind == FREE and ident in ordinal:
            freed.append(-1 - ordinal[ident])
    return out + sorted(freed, reverse=True)


@pytest.mark.parametrize("name", ["checkpointing", "ddp", "math"])
def test_order_of_a_real_run(name: str) -> None:
    recorded = json.loads(gzip.decompress((DATA / f"large_blocks_{name}.json.gz").read_bytes()))
    replay = Replay(load(recorded["overrides"]))
    replay.build()
    for _ in range(recorded["steps"]):
        replay.step()
    expected = recorded["events"]
    assert large_blocks(replay.trace.events)[: len(expected)] == expected


def test_the_first_bucket_goes_before_the_second_ones_come_or_with_the_first_reduction() -> None:
    sizes = ["model=25m", "train.seq_len=128", "parallel=ddp", "world_size=2", "hardware=h200"]
    peaks = {}
    for release in (True, False):
        replay = Replay(load([*sizes, f"parallel.ddp.release_first_bucket={release}"]))
        replay.build()
        for _ in range(3):
            replay.step()
        live = peak = 0
        for kind, _, nbytes, _, label, _ in replay.trace.events:
            if label == "DDP bucket" and kind in (ALLOC, FREE):
                live += nbytes if kind == ALLOC else -nbytes
                peak = max(peak, live)
        gradients = sum(s.numel * 4 for s in replay.rule.trained)
        peaks[release] = peak / gradients
        assert live / gradients == pytest.approx(1, rel=1e-3)
    assert peaks[True] == pytest.approx(1, rel=1e-3)
    assert peaks[False] == pytest.approx(2, rel=1e-3)


def labels(tape: Tape) -> list[str]:
    return [e[4] for e in tape.trace.events if e[0] == ALLOC]


def test_a_product_makes_its_second_factors_gradient_first() -> None:
    """derivatives.yaml: an operation's gradients are made in the order of its arguments' names, other before self."""
    tape = Tape(Trace())
    ops = Ops(tape)
    x, y = (Tensor(tape.new(n, 4, "operand").storage, 8, 4, Accumulator("operand")) for n in (8, 8))
    node = ops.mul(x, y, "product").node
    assert node is not None
    assert node.backward is not None
    gx, gy = node.backward([tape.new(8, 4, "gradient")])
    assert gx is not None
    assert gy is not None
    assert gy.storage.id < gx.storage.id


def test_a_recomputed_product_takes_the_backward_threads_workspace() -> None:
    """Chunked loss: the first product of backward's thread belongs to the recomputation."""
    replay = Replay(load(["model=25m", "loss=chunked", "train.seq_len=512", "hardware=h200"]))
    replay.build()
    replay.step()
    made = labels(replay.tape)
    workspace = made.index("cuBLAS workspace, backward thread")
    assert "gradient of head.weight" not in made[:workspace]
    assert made[workspace - 1] == "logits"


def test_a_bias_gradients_semaphores_are_a_block_of_their_own() -> None:
    tape = Tape(Trace())
    ops = Ops(tape, num_streaming_multiprocessors=132)
    w = Parameter("w", (2816, 64), tape.new(2816 * 64, 2, "w", MemoryCategory.PARAMETERS), Accumulator("w"))
    b = Parameter("b", (2816,), tape.new(2816, 2, "b", MemoryCategory.PARAMETERS), Accumulator("b"))
    x = tape.new(2048 * 64, 2, "x")
    node = ops.linear(x, w, b, 2048, "y").node
    assert node is not None
    assert node.backward is not None
    node.backward([tape.new(2048 * 2816, 2, "gradient")])
    assert [e[2] for e in tape.trace.events if e[0] == ALLOC and e[4] == "column sum"] == [46_137_344, 88]
