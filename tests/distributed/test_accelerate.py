"""engine=accelerate for real, two gloo ranks: the prediction equals the measurement to the byte; what was applied."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.analytic.step import Replay
from lab.analytic.timeline import phases
from lab.config import RunConfig, load
from lab.record import RunRecord
from lab.track.bundle import read_records
from tests.distributed.accelerate_fsdp_worker import configuration
from tests.distributed.small_run import ENVIRONMENT, lab, small_run
from tests.unit.hf_cases import write_config

pytestmark = pytest.mark.distributed


def compare(cfg: RunConfig, record: RunRecord) -> None:
    assert record.status == "ok", record.error
    for measured in record.ranks:
        replay: Any = Replay(cfg, measured.rank)
        replay.build()
        for step, readings in enumerate(measured.steps):
            replay.step()
            predicted = phases(replay.trace.events, step)
            for phase, reading in readings.phases.items():
                where = f"rank {measured.rank}, step {step}, {phase}"
                assert predicted[phase].peak.total_bytes == reading.peak_allocated_bytes, where
                assert predicted[phase].end.total_bytes == reading.end_allocated_bytes, where


@pytest.mark.parametrize(
    ("options", "applied"),
    [
        (["parallel=single", "world_size=1", "train.gradient_accumulation_steps=2"], "NO, num_processes=1"),
        (["parallel=ddp", "model.hidden_size=512"], "MULTI_CPU, num_processes=2, mixed_precision=bf16"),
        (["parallel=zero1", "train.gradient_accumulation_steps=2"], "DEEPSPEED, .*zero_stage=1"),
    ],
)
def test_prediction_is_the_measurement(options: list[str], applied: str, tmp_path: Path) -> None:
    overrides = [*small_run(tmp_path), "model.vocab_size=400", "engine=accelerate", "world_size=2"]
    overrides = [o for o in overrides if not any(o.split("=")[0] == p.split("=")[0] for p in options)] + options
    overrides += ["parallel.zero.reduce_bucket_size=30000"] if "zero" in options[0] else []
    done = lab("train", *overrides, cwd=tmp_path)
    records = list(read_records([tmp_path / "outputs"]))
    assert len(records) == 1, done.stdout + done.stderr
    compare(load(overrides), records[0][1])
    note = next(n for n in records[0][1].notes if n.startswith("engine=accelerate applied distributed_type="))
    assert re.search(applied, note), note


def hugging_face(folder: Path, family: str) -> list[str]:
    text = [o for o in small_run(folder) if not o.startswith("model.")]
    model = ["model=hf", f"model.path={write_config(folder, family)}", "model.random_weights=true"]
    return [*text, *model, "precision=bf16_mixed", "train.micro_batch_size=2"]


LORA = ["adapter=lora", "adapter.dropout=0.1", "train.gradient_accumulation_steps=2"]
BUCKETS = [
    "parallel.zero.reduce_bucket_size=20000",
    "parallel.zero.stage3_prefetch_bucket_size=3000",
    "parallel.zero.stage3_param_persistence_threshold=100",
]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", ["parallel=ddp", *LORA, "quantization=nf4_double"]),
        ("llama", ["parallel=zero3", *LORA, *BUCKETS]),
    ],
)
def test_hugging_face(family: str, options: list[str], tmp_path: Path) -> None:
    """Somebody's model with peft and bitsandbytes through Accelerate."""
    overrides = [*hugging_face(tmp_path, family), "engine=accelerate", "measure=ledger", "world_size=2", *options]
    done = lab("train", *overrides, cwd=tmp_path)
    records = list(read_records([tmp_path / "outputs"]))
    assert len(records) == 1, done.stdout + done.stderr
    record = records[0][1]
    compare(load(overrides), record)
    assert len(record.ranks) == 2
    assert all(not p.unattributed_bytes for r in record.ranks for s in r.steps for p in s.phases.values())


@pytest.mark.parametrize("family", ["lab", "llama"])
def test_fsdp2(family: str, tmp_path: Path) -> None:
    """fsdp2_prepare_model and ``no_sync`` on a CPU: accelerate_fsdp_worker.py says how.

    A transformers model's embedding, and its final norm with the head, are units of their own.
    """
    lab_model = [*small_run(tmp_path), "model.vocab_size=400"]
    overrides = lab_model if family == "lab" else [*hugging_face(tmp_path, family), "adapter=lora"]
    overrides += ["parallel=fsdp", "world_size=2", "checkpointing=full", "train.gradient_accumulation_steps=2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("accelerate_fsdp_worker.py")), *overrides]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )
    records = list(read_records([tmp_path / "outputs"]))
    assert len(records) == 1, done.stdout + done.stderr
    compare(configuration(overrides), records[0][1])
    for reading in (r for rank in records[0][1].ranks for r in rank.steps[-1].phases.values()):
        assert reading.ledger  # whole gradients too, which units keep while they are resharded
        # A few scalars, on a GPU run the host's; and a frozen embedding's gradient, which transformers' checkpointing
        # has made: [2, 32, 32] in bf16.
        assert reading.unattributed_bytes <= 32 + (0 if family == "lab" else 4096)
