"""ZeRO for real, two gloo ranks: the prediction equals the measurement to the byte, on every rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.analytic.step import Replay
from lab.analytic.timeline import phases
from lab.config import load
from lab.track.bundle import read_records
from lab.vocab import MemoryCategory, StepPhase

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
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
    ],
)
def test_prediction_is_the_measurement(options: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(4000)))
    overrides = [
        *("hardware=cpu", "tracker=none", "measure=ledger", "data=text", f"data.path={text}", "world_size=2"),
        *("data.tokenizer_vocab_size=400", "model.vocab_size=400", "model.num_layers=2", "train.seq_len=32"),
        *("train.steps=3", "parallel.zero.reduce_bucket_size=30000", *options),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lab.cli", "train", *overrides]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
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
