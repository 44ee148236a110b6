"""The CPU storage tracker, held against PyTorch's MemTracker and against tensors of known size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from lab.config import load
from lab.measure import StorageTracker
from lab.model import Decoder

Read = Callable[[], tuple[int, int]]  # (current, peak) bytes


def train_steps(read: Read, model: Decoder, batch: Tensor, bf16: bool, each_step: Callable[[], None]) -> list[int]:
    """Two AdamW steps; current bytes after forward, backward, step, zero_grad, and each step's peak."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    seen: list[int] = []
    for _ in range(2):
        each_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(batch, batch)
        seen.append(read()[0])
        loss.backward()
        del loss
        seen.append(read()[0])
        optimizer.step()
        seen.append(read()[0])
        optimizer.zero_grad()
        seen += read()
    return seen


def build(full_checkpointing: bool) -> tuple[Decoder, Tensor]:
    cfg = load(["model=tiny", "train.seq_len=64", "hardware=cpu"])
    torch.manual_seed(0)
    model = Decoder(cfg.model, cfg.attention, cfg.loss)
    if full_checkpointing:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model, torch.randint(0, cfg.model.vocab_size, (2, 64))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16_mixed"])
@pytest.mark.parametrize("full", [False, True], ids=["none", "full"])
def test_same_bytes_as_mem_tracker(full: bool, bf16: bool) -> None:
    model, batch = build(full)
    tracker = StorageTracker()
    tracker.start()
    tracker.register([*model.parameters(), batch])
    try:
        ours = train_steps(lambda: (tracker.current_bytes, tracker.peak_bytes), model, batch, bf16, lambda: None)
    finally:
        tracker.stop()

    model, batch = build(full)
    theirs_tracker = MemTracker()
    theirs_tracker.track_external(model, batch)

    def read() -> tuple[int, int]:
        cpu = torch.device("cpu")
        snapshots = [theirs_tracker.get_tracker_snapshot(kind) for kind in ("current", "peak")]
        return snapshots[0][cpu]["Total"], snapshots[1][cpu]["Total"]

    with theirs_tracker:
        theirs = train_steps(read, model, batch, bf16, theirs_tracker.reset_mod_stats)
    assert ours == theirs
    assert ours[-1] > ours[-2] > 3 * sum(p.nbytes for p in model.parameters())


def test_counts_storages_once_and_lets_them_go(tracker: StorageTracker) -> None:
    a = torch.ones(1000)
    assert tracker.current_bytes == 4000
    view, same = a[10:].view(99, 10), a.add_(1)
    assert tracker.current_bytes == 4000
    del a, same
    assert tracker.current_bytes == 4000  # the view keeps the storage
    del view
    assert tracker.current_bytes == 0
    assert tracker.peak_bytes == 4000
    tracker.reset_peak()
    assert tracker.peak_bytes == 0


def test_sees_what_backward_makes(tracker: StorageTracker) -> None:
    w = torch.nn.Parameter(torch.ones(100, 100))
    (w * w).sum().backward()
    assert w.grad is not None
    assert tracker.current_bytes == 2 * 40_000
    assert tracker.peak_bytes >= 3 * 40_000


def test_sees_resizes_of_storages_and_of_tensors(tracker: StorageTracker) -> None:
    a = torch.zeros(1000)
    a.untyped_storage().resize_(0)
    assert tracker.current_bytes == 0
    a.untyped_storage().resize_(4000)
    assert tracker.current_bytes == 4000
    a.resize_(2000)
    assert tracker.current_bytes == 8000
    out = torch.empty(0)
    torch.add(a, a, out=out)
    assert tracker.current_bytes == 16_000


def test_ignores_memory_that_torch_did_not_allocate(tracker: StorageTracker) -> None:
    lent = torch.from_numpy(np.zeros(1000))
    assert lent[5:].sum() == 0
    del lent
    assert torch.empty(1000, device="meta").add(1).shape == (1000,)
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(1000) + 1
    del fake
    assert tracker.current_bytes == 0


def test_register_enters_older_tensors_once() -> None:
    older = torch.zeros(1000)
    view = older[1:]
    tracker = StorageTracker()
    tracker.start()
    try:
        assert tracker.register([older, view]) == 4000
        assert tracker.register([older]) == 0
        del older, view
        assert tracker.current_bytes == 0
    finally:
        tracker.stop()


def test_wrapper_subclasses_count_their_inner_tensors(tracker: StorageTracker) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    pair = TwoTensor(torch.ones(100), torch.ones(100))
    assert tracker.current_bytes == 800
    doubled = pair + pair
    assert tracker.current_bytes == 1600
    del pair, doubled
    assert tracker.current_bytes == 0


def test_stop_restores_resize() -> None:
    before = torch.UntypedStorage.resize_
    tracker = StorageTracker()
    tracker.start()
    assert torch.UntypedStorage.resize_ is not before
    tracker.stop()
    assert torch.UntypedStorage.resize_ is before
    torch.ones(10)
    assert tracker.peak_bytes == 0
