"""On one GPU: the ledger closes to the byte, looking moves no counter, snapshots open, NVML sees more than us."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lab.build import build
from lab.config import load
from lab.measure import make_meter
from lab.record import RankMeasurement
from lab.vocab import MemoryCategory, StepPhase

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

C = MemoryCategory
STEPS = 4


def measure(folder: Path, *overrides: str) -> RankMeasurement:
    """Four steps of a small model on the first GPU, every tensor of the loop's own declared."""
    base = ["model=25m", "train.seq_len=512", "train.micro_batch_size=4", f"train.steps={STEPS}", "world_size=1"]
    cfg, device = load([*base, *overrides]), torch.device("cuda", 0)
    gc.collect()  # a checkpointed block's wrapped forward refers to the block: the run before is a reference cycle
    torch.cuda.empty_cache()
    meter = make_meter(cfg, device, 0, 0)
    meter.snapshot_dir = folder
    meter.start()
    engine = build(cfg, device)
    tokens = torch.randint(0, cfg.model.vocab_size, (4, 512), device=device)

    def live_tensors() -> Iterator[tuple[MemoryCategory, torch.Tensor]]:
        yield from engine.live_tensors()
        yield C.TEMPORARIES, tokens

    meter.set_live_tensors(live_tensors, engine.unseen_allocations)
    meter.build_done()
    for index in range(STEPS):
        with meter.step(index):
            with meter.phase(StepPhase.FORWARD):
                loss = engine.forward(tokens, tokens)
                meter.claim(C.LOGITS_AND_LOSS, loss)
            with meter.phase(StepPhase.BACKWARD):
                engine.backward(loss, True)
            del loss
            with meter.phase(StepPhase.OPTIMIZER_STEP):
                engine.optimizer_step()
            with meter.phase(StepPhase.ZERO_GRAD):
                engine.zero_grad()
    result = meter.measurement()
    meter.stop()
    engine.close()
    return result


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("precision", ["bf16_mixed", "bf16_pure", "fp32"])
def test_ledger_closes_and_moves_no_counter(tmp_path: Path, precision: str, checkpointing: str) -> None:
    overrides = [f"precision={precision}", f"checkpointing={checkpointing}"]
    measure(tmp_path, "measure.ledger_steps=[]", *overrides)  # the process's first run makes the cuBLAS workspaces
    plain = measure(tmp_path, "measure.ledger_steps=[]", *overrides)
    counted = measure(tmp_path, "measure=ledger", *overrides)
    for step, same in zip(counted.steps, plain.steps, strict=True):
        assert step.seconds > 0
        for phase, reading in step.phases.items():
            other = same.phases[phase]
            assert reading.peak_allocated_bytes == other.peak_allocated_bytes, (step.step, phase)
            assert reading.end_allocated_bytes == other.end_allocated_bytes, (step.step, phase)
            assert reading.ledger is not None
            assert reading.unattributed_bytes is not None
            assert reading.ledger.total_bytes + reading.unattributed_bytes == reading.end_allocated_bytes
            assert reading.unattributed_bytes <= 64 * 512, counted.notes
            assert reading.seconds > 0 or phase is StepPhase.ZERO_GRAD
    assert counted.steps[-1].phases[StepPhase.FORWARD].ledger[C.LIBRARY_WORKSPACES] > 0  # type: ignore[index]


def test_levels_are_ordered_and_nvml_sees_all(tmp_path: Path) -> None:
    result = measure(tmp_path)
    assert result.source == "cuda_caching_allocator"
    for step in result.steps:
        last = step.phases[StepPhase.ZERO_GRAD]
        assert last.end_allocated_bytes <= last.end_active_bytes <= last.end_reserved_bytes
        assert last.device_used_bytes is not None
        assert last.device_used_bytes > last.end_reserved_bytes  # and the CUDA context
    assert not [note for note in result.notes if "NVML" in note]


def test_snapshot_of_the_last_step(tmp_path: Path) -> None:
    measure(tmp_path, "measure=snapshot")
    snapshot = pickle.loads((tmp_path / "snapshot_rank_0.pickle").read_bytes())
    assert snapshot["segments"]
    assert any(len(trace) > 100 for trace in snapshot["device_traces"])
