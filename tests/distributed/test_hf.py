"""Two gloo processes train Hugging Face models: every phase's end and peak as predicted, on both ranks' worst."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lab.record import read_record
from lab.vocab import STEP_PHASES
from tests.distributed.small_run import ENVIRONMENT, small_run
from tests.unit.hf_cases import write_config

pytestmark = pytest.mark.distributed

SMALL_BUCKETS = [
    "parallel.zero.reduce_bucket_size=20000",
    "parallel.zero.stage3_prefetch_bucket_size=3000",
    "parallel.zero.stage3_param_persistence_threshold=100",
]
POINTS = {
    "ddp": ("gpt2", ["parallel=ddp", "precision=bf16_mixed"]),
    "fsdp": ("qwen3", ["parallel=fsdp", "precision=bf16_mixed", "checkpointing=full"]),
    "zero3_frozen": (
        "llama",
        [
            *("parallel=zero3", "adapter=lora", "checkpointing=full", "parallel.zero.reduce_bucket_size=20000"),
            "parallel.zero.stage3_param_persistence_threshold=0",
        ],
    ),
    "fsdp_sliding": ("qwen3_sliding", ["parallel=fsdp", "precision=bf16_mixed", "checkpointing=every_k"]),
    "zero3": ("gemma", ["parallel=zero3", "precision=bf16_mixed", "checkpointing=full", *SMALL_BUCKETS]),
}


@pytest.mark.parametrize("point", POINTS)
def test_two_ranks_to_the_byte(point: str, tmp_path: Path) -> None:
    family, overrides = POINTS[point]
    path = write_config(tmp_path, family)
    text = [o for o in small_run(tmp_path, steps=4) if not o.startswith("model.")]
    model = ["model=hf", f"model.path={path}", "model.random_weights=true", "train.micro_batch_size=2"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lab.train",
    ]
    out = subprocess.run(
        [*command, *text, *model, *overrides, "name=hf"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    (file,) = tmp_path.glob("outputs/hf/*/record.json")
    record = read_record(file)
    assert record.prediction is not None, record.notes
    tree = json.loads(file.read_text())
    for phase in STEP_PHASES:
        expected = record.prediction.steady.phases[phase]
        seen = [rank["steps"][-1]["phases"][phase.value] for rank in tree["ranks"]]
        assert expected.end.total_bytes == max(s["end_allocated_bytes"] for s in seen), phase
        assert expected.peak.total_bytes == max(s["peak_allocated_bytes"] for s in seen), phase
    assert all(s["loss"] < 20 for s in tree["ranks"][0]["steps"])
