"""ZeRO for real, two gloo ranks: the prediction equals the measurement to the byte, on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.analytic.step import Replay
from lab.analytic.timeline import phases
from lab.config import load
from lab.track.bundle import read_records
from lab.vocab import MemoryCategory, StepPhase
from tests.distributed.small_run import lab, small_run

pytestmark = pytest.mark.distributed
STATES = (
    MemoryCategory.PARAMETERS,
    MemoryCategory.MASTER_WEIGHTS,
    MemoryCategory.GRADIENTS,
    MemoryCategory.OPTIMIZER_STATES,
    MemoryCategory.COMM_BUFFERS,
)


@pytest.mark.parametrize(
    "options",
    [
        # 30000 elements: several reductions in one backward, and embedding and head too large for the bucket
        ["parallel=zero1", "precision=bf16_mixed", "train.max_grad_norm=1.0"],
        ["parallel=zero2", "precision=bf16_pure", "train.gradient_accumulation_steps=2"],
        # prefetches of two projections, modules fetched again in recomputation and in backward
        [
            *("parallel=zero3", "precision=bf16_mixed", "checkpointing=full", "train.gradient_accumulation_steps=2"),
            *("parallel.zero.stage3_prefetch_bucket_size=30000", "parallel.zero.stage3_max_reuse_distance=20000"),
            "parallel.zero.stage3_param_persistence_threshold=200",
        ],
        # a frozen base: what a recomputation gathers belongs to another module, what peft reads too
        [
            *("parallel=zero3", "adapter=lora", "checkpointing=full", "loss=chunked", "loss.num_chunks=2"),
            *("parallel.zero.stage3_param_persistence_threshold=0", "parallel.zero.stage3_prefetch_bucket_size=30000"),
        ],
        # states per sub-group, one pair of code tables for all
        ["parallel=zero3", "precision=bf16_mixed", "optimizer=adamw_8bit", "parallel.zero.sub_group_size=40000"],
    ],
)
def test_prediction_is_the_measurement(options: list[str], tmp_path: Path) -> None:
    overrides = [*small_run(tmp_path), *("measure=ledger", "world_size=2", "model.vocab_size=400"), *options]
    overrides += ["parallel.zero.reduce_bucket_size=30000"]
    done = lab("train", *overrides, cwd=tmp_path)
    records = list(read_records([tmp_path / "outputs"]))
    assert len(records) == 1, done.stdout + done.stderr
    cfg = load(overrides)
    for measured in records[0][1].ranks:
        replay = Replay(cfg, measured.rank)
        replay.build()
        for step, readings in enumerate(measured.steps):
            replay.step()
            predicted = phases(replay.trace.events, step)
            for phase, reading in readings.phases.items():
                where = f"rank {measured.rank}, step {step}, {phase}"
                assert predicted[phase].peak.total_bytes == reading.peak_allocated_bytes, where
                assert predicted[phase].end.total_bytes == reading.end_allocated_bytes, where
                if reading.ledger is not None:
                    for category in STATES:
                        assert predicted[phase].end.categories[category] == reading.ledger[category], (where, category)
        assert any(r.phases[StepPhase.BACKWARD].ledger for r in measured.steps)
