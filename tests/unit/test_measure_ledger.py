"""The ledger: every live byte of a step has its category, and looking changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lab.config import RunConfig, load
from lab.measure import Ledger, StorageTracker, make_meter
from lab.measure.census import Allocation, by_size, census_of_segments, cpu_census
from lab.measure.ledger import LedgerReading
from lab.model import Decoder
from lab.record import RankMeasurement
from lab.transforms.checkpointing import apply_checkpointing
from lab.vocab import MemoryBreakdown, MemoryCategory, Precision, StepPhase

C = MemoryCategory
TOKENS = 2 * 64


def configure(*overrides: str) -> RunConfig:
    return load(["model=tiny", "train.seq_len=64", "train.steps=3", "hardware=cpu", *overrides])


def measure(cfg: RunConfig) -> RankMeasurement:
    """A run of the decoder on one process, every long-lived tensor declared."""
    torch.manual_seed(0)
    meter = make_meter(cfg, torch.device("cpu"), 0, 0)
    meter.start()
    model = Decoder(cfg.model, cfg.attention, cfg.loss)
    apply_checkpointing(model.blocks, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = torch.randint(0, cfg.model.vocab_size, (2, 64))

    def live_tensors() -> Iterator[tuple[MemoryCategory, Tensor]]:
        for parameter in model.parameters():
            yield C.PARAMETERS, parameter
            if parameter.grad is not None:
                yield C.GRADIENTS, parameter.grad
        for state in optimizer.state.values():
            yield from ((C.OPTIMIZER_STATES, value) for value in state.values())
        yield C.TEMPORARIES, batch

    meter.set_live_tensors(live_tensors)
    meter.build_done()
    for index in range(cfg.train.steps):
        with meter.step(index):
            with meter.phase(StepPhase.FORWARD):
                with torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision.kind is Precision.BF16_MIXED):
                    loss = model(batch, batch)
                meter.claim(C.LOGITS_AND_LOSS, loss)
            with meter.phase(StepPhase.BACKWARD):
                loss.backward()
            del loss
            with meter.phase(StepPhase.OPTIMIZER_STEP):
                optimizer.step()
            with meter.phase(StepPhase.ZERO_GRAD):
                optimizer.zero_grad()
    meter.stop()
    return meter.measurement()


CASES = [
    ["precision=fp32"],
    ["precision=bf16_mixed"],
    ["precision=bf16_mixed", "checkpointing=full"],
    ["precision=fp32", "checkpointing=selective"],
    ["precision=fp32", "loss=chunked", "attention=eager"],
    ["precision=bf16_mixed", "loss=in_place"],
    ["precision=bf16_mixed", "loss=no_upcast"],
    ["precision=fp32", "model.tied_head=true", "model.norm=layernorm", "model.mlp=gelu", "model.position=learned"],
]


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_every_byte_has_a_category_and_hooks_move_none(overrides: list[str]) -> None:
    with_ledger = measure(configure("measure=ledger", *overrides))
    without = measure(configure("measure.ledger_steps=[]", *overrides))
    names = ("end_allocated_bytes", "peak_allocated_bytes", "end_reserved_bytes", "peak_active_bytes")
    for seen, unseen in zip(with_ledger.steps, without.steps, strict=True):
        for phase, reading in seen.phases.items():
            assert [getattr(reading, n) for n in names] == [getattr(unseen.phases[phase], n) for n in names]
            assert unseen.phases[phase].ledger is None
            assert reading.ledger is not None
            assert reading.unattributed_bytes == 0
            assert reading.ledger.total_bytes == reading.end_allocated_bytes
    assert with_ledger.build is not None
    assert with_ledger.build.ledger == MemoryBreakdown(
        {C.PARAMETERS: with_ledger.build.end_allocated_bytes - TOKENS * 8, C.TEMPORARIES: TOKENS * 8}
    )


def test_categories_after_forward_are_those_counted_by_hand() -> None:
    cfg = configure("precision=fp32", "measure=ledger", "checkpointing=full")
    ledger = measure(cfg).steps[-1].phases[StepPhase.FORWARD].ledger
    parameters = 4 * sum(p.numel() for p in Decoder(cfg.model, cfg.attention, cfg.loss).parameters())
    hidden = TOKENS * cfg.model.hidden_size * 4
    rope = 2 * 64 * cfg.model.head_dim * 4
    block_inputs = cfg.model.num_layers * hidden
    # The last block's output; the final norm, on a CPU op by op: x * rstd, times weight (the head's input), rstd.
    tail = 3 * hidden + TOKENS * 4
    saved_scalars = 4  # nll_loss's total weight
    assert ledger == MemoryBreakdown(
        {
            C.PARAMETERS: parameters,
            C.OPTIMIZER_STATES: 2 * parameters + 4 * (9 * cfg.model.num_layers + 3),
            C.ACTIVATIONS: rope + block_inputs + tail + saved_scalars,
            C.LOGITS_AND_LOSS: TOKENS * cfg.model.vocab_size * 4 + 4,
            C.TEMPORARIES: TOKENS * 8,
        }
    )


def test_hooks_make_no_reference_cycle(tracker: StorageTracker) -> None:
    x = nn.Parameter(torch.ones(1000))
    gc.disable()
    try:
        with Ledger(vocab_size=7).watch_forward():
            y = (x.exp() * x.tanh()).sum()
        assert tracker.current_bytes > 3 * 4000
        del y
        assert tracker.current_bytes == 4000
    finally:
        gc.enable()


def test_first_claim_counts_and_storages_count_once(tracker: StorageTracker) -> None:
    flat, other = torch.zeros(1000), torch.zeros(10)
    ledger = Ledger(vocab_size=7)
    ledger.claim(C.ACTIVATIONS, flat)
    known = [(C.PARAMETERS, flat[:500]), (C.GRADIENTS, flat[500:])]
    reading = ledger.count(known, cpu_census(tracker))
    assert reading.categories == {C.PARAMETERS: 4000}
    assert reading.unattributed_bytes == 40
    assert other.numel() == 10


def test_logits_by_shape_but_not_the_head_weight(tracker: StorageTracker) -> None:
    ledger = Ledger(vocab_size=50)
    head, x = nn.Linear(8, 50, bias=False), torch.ones(3, 8, requires_grad=True)
    with ledger.watch_forward():  # backward of x needs the copy of the weight, saved as its transpose [8, 50]
        loss = nn.functional.cross_entropy(nn.functional.linear(x, head.weight * 2), torch.zeros(3, dtype=torch.long))
    reading = ledger.count([], cpu_census(tracker))
    assert reading.categories[C.LOGITS_AND_LOSS] == 3 * 50 * 4
    assert reading.categories[C.ACTIVATIONS] == (3 * 8 + 50 * 8) * 4 + 3 * 8 + 4  # x, weight, targets, total weight
    assert reading.unattributed_bytes == 50 * 8 * 4 + 4  # the head's own weight, the loss
    del loss


def test_allocations_without_a_tensor_are_found_by_exact_size(tracker: StorageTracker) -> None:
    buckets = [torch.zeros(1000), torch.zeros(1000), torch.zeros(999)]
    census = cpu_census(tracker)
    reading = Ledger(vocab_size=7).count([], census, unseen=[(C.COMM_BUFFERS, 4000), (C.COMM_BUFFERS, 3000)])
    assert reading.categories == {C.COMM_BUFFERS: 4000}
    assert reading.unattributed_bytes == 4000 + 3996
    assert len(buckets) == 3


def test_workspaces_are_what_is_still_there_at_the_steps_end() -> None:
    size = 32 << 20
    block = Allocation(size, size, size)
    forward = LedgerReading(MemoryBreakdown(), {1: block, 2: block, 3: Allocation(512, 8, 512)})
    end = LedgerReading(MemoryBreakdown(), {1: block, 3: Allocation(512, 8, 512)})
    Ledger(vocab_size=7, workspace_sizes=(size, 0)).settle_workspaces([forward, end])
    for reading, left in ((forward, size + 512), (end, 512)):
        assert reading.categories == {C.LIBRARY_WORKSPACES: size}
        assert reading.unattributed_bytes == left


class FakeStorage:
    def __init__(self, pointer: int, size: int, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self._pointer, self._size = pointer, size

    def data_ptr(self) -> int:
        return self._pointer

    def nbytes(self) -> int:
        return self._size


def block(size: int, requested: int, state: str = "active_allocated") -> dict[str, Any]:
    return {"size": size, "requested_size": requested, "state": state}


def test_census_of_an_allocator_snapshot() -> None:
    segments = [
        {"device": 0, "address": 4096, "blocks": [block(512, 4), block(1024, 0, "inactive"), block(4096, 2000)]},
        {"device": 0, "address": 1 << 20, "blocks": [block(512, 512, "active_awaiting_free"), block(512, 500)]},
        {"device": 1, "address": 1 << 30, "blocks": [block(512, 512)]},
    ]
    census = census_of_segments(segments, 0)
    # 2000 bytes are four units of 512; a block of 4096 for them would be a rest that was not cut off.
    assert census.allocations == {
        4096: Allocation(512, 4, 512),
        4096 + 1536: Allocation(4096, 2000, 2048),
        (1 << 20) + 512: Allocation(512, 500, 512),
    }
    assert census.find(FakeStorage(4096, 4)) == 4096
    assert census.find(FakeStorage(4096 + 1536 + 1000, 8)) == 4096 + 1536  # an address inside a block
    assert census.find(FakeStorage(4096 + 600, 8)) is None  # inactive
    assert census.find(FakeStorage(100, 8)) is None
    assert census.find(FakeStorage(4096, 0)) is None
    assert census.find(FakeStorage(4096, 8, "cpu")) is None
    assert census.find(FakeStorage(1 << 30, 8)) is None  # another device's


def test_leftovers_are_listed_by_size() -> None:
    allocations = {i: Allocation(512, 8, 512) for i in range(3)} | {9: Allocation(1024, 1000, 1024)}
    assert by_size(allocations) == "1 x 1000 B, 3 x 8 B"
    assert by_size(allocations, most=1) == "1 x 1000 B, and 1 more sizes"


def test_the_gradient_of_a_parameter_that_only_the_graph_holds_is_an_activation() -> None:
    """As peft's DoRA makes one of a Conv1D's weight: F.linear keeps a view of it, and AccumulateGrad the rest."""
    ledger, tracker = Ledger(vocab_size=1000), StorageTracker()
    weight, x = torch.randn(64, 48), torch.randn(2, 64, requires_grad=True)
    tracker.start()
    with ledger.watch_forward():
        y = nn.functional.linear(x, nn.Parameter(weight.T))
    y.backward(torch.ones_like(y), retain_graph=True)
    tracker.stop()
    tracker.register([weight, x])
    known = [(C.PARAMETERS, weight), (C.ACTIVATIONS, y), (C.ACTIVATIONS, x)]
    assert x.grad is not None
    reading = ledger.count([*known, (C.GRADIENTS, x.grad)], cpu_census(tracker))
    assert reading.unattributed_bytes == 0
    assert reading.categories[C.ACTIVATIONS] == y.nbytes + x.nbytes + weight.nbytes
