"""MemoryCallback in a real transformers.Trainer run: phases, prediction to the byte, record, logs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.analytic.step import Replay
from lab.analytic.timeline import phases
from lab.config import run_config_from_json
from lab.track.bundle import read_records
from lab.vocab import STEP_PHASES, MemoryCategory, StepPhase
from tests.distributed.small_run import ENVIRONMENT, ROOT, lab

pytestmark = pytest.mark.distributed


def example(folder: Path, *options: str, ranks: int = 1) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "launch/hf_trainer_example.py"), *options]
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--layers", "3", "--optim", "adamw_torch"],
        ["--lora", "4", "--nf4", "--checkpointing"],
        ["--attention", "eager"],
        ["--window", "48"],
        ["--window", "48", "--attention", "eager", "--checkpointing"],
    ],
)
def test_prediction_is_the_measurement(options: list[str], tmp_path: Path) -> None:
    out = example(tmp_path, "--accumulation", "2", *options)
    ((_, record),) = read_records([tmp_path / "outputs"])
    assert record.status == "ok"
    assert record.prediction is not None
    assert not [n for n in record.notes if n.startswith("no prediction")]
    replay: Any = Replay(run_config_from_json(record.config))
    replay.build()
    for index, step in enumerate(record.ranks[0].steps):
        replay.step()
        predicted = phases(replay.trace.events, index)
        assert tuple(step.phases) == STEP_PHASES
        for phase, reading in step.phases.items():
            assert predicted[phase].peak.total_bytes == reading.peak_allocated_bytes, (index, phase)
            assert predicted[phase].end.total_bytes == reading.end_allocated_bytes, (index, phase)
    assert all(step.loss is not None for step in record.ranks[0].steps)
    for reading in record.ranks[0].steps[-1].phases.values():
        assert reading.unattributed_bytes is not None
        assert abs(reading.unattributed_bytes) <= 0.02 * reading.end_allocated_bytes  # scalars of a tiny model
    peak = next(r for r in record.residuals if r.where == "peak")
    assert peak.predicted_bytes == peak.measured_bytes

    logs = [ast.literal_eval(line) for line in out.splitlines() if line.startswith("{'loss'")]
    assert len(logs) == 4
    assert [float(entry["memory/error_percent"]) for entry in logs] == [0.0] * 4
    assert float(logs[-1]["memory/predicted_peak_gib"]) == float(logs[-1]["memory/measured_peak_gib"]) > 0

    shown = lab("compare", "outputs", cwd=tmp_path)
    assert "single" in shown.stdout
    assert "0.00" in shown.stdout
    assert lab("validate", "outputs", cwd=tmp_path).returncode == 0


def test_ddps_buckets_are_in_the_ledger(tmp_path: Path) -> None:
    """The Trainer keeps DDP's wrapper to itself; the buckets are gradients' bytes all the same."""
    example(tmp_path, ranks=2)
    ((_, record),) = read_records([tmp_path / "outputs"])
    assert record.status == "ok"
    assert record.prediction is not None
    for rank in record.ranks:
        last = rank.steps[-1].phases[StepPhase.BACKWARD]
        assert last.tensors is not None
        assert last.unattributed_bytes is not None
        assert last.tensors[MemoryCategory.COMM_BUFFERS] == last.tensors[MemoryCategory.GRADIENTS] > 0
        assert abs(last.unattributed_bytes) <= 0.01 * last.end_allocated_bytes
    peak = next(r for r in record.residuals if r.where == "peak")
    assert abs(peak.predicted_bytes - peak.measured_bytes) <= 0.01 * peak.measured_bytes


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_buffers_are_in_the_ledger(stage: int, tmp_path: Path) -> None:
    """Accelerate's backward takes DeepSpeed's step too, so stage 2's gradients are gone when that phase ends."""
    example(tmp_path, "--zero", str(stage), ranks=2)
    ((_, record),) = read_records([tmp_path / "outputs"])
    assert record.status == "ok"
    assert record.prediction is not None
    assert record.config["parallel"]["strategy"] == f"zero{stage}"
    for rank in record.ranks:
        last = rank.steps[-1].phases[StepPhase.BACKWARD]
        assert last.tensors is not None
        assert last.unattributed_bytes is not None
        assert (last.tensors.get(MemoryCategory.GRADIENTS, 0) > 0) is (stage == 3)
        whole_or_half = {2: 1, 3: 2}[stage]  # bf16 weights against half the fp32 ones
        assert (
            last.tensors[MemoryCategory.MASTER_WEIGHTS] == whole_or_half * last.tensors[MemoryCategory.PARAMETERS] > 0
        )
        assert abs(last.unattributed_bytes) <= 0.02 * last.end_allocated_bytes
    errors = {r.where: r.predicted_bytes - r.measured_bytes for r in record.residuals}
    for where in ("peak", "forward.peak", "backward.peak", "backward.end", "zero_grad.end"):
        assert abs(errors[where]) <= 16 << 10, where
