"""Quantized bases and adapters really trained on a CPU: every point of the studies, to the byte; two ranks of FSDP2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.cli.points import study_points
from tests.distributed.points_worker import off_by
from tests.distributed.small_run import ENVIRONMENT, ROOT, small_run
from tests.unit.hf_cases import hf_overrides, write_config

LORA = ["adapter=lora", "precision=bf16_mixed"]
GPT2 = ["model.norm=layernorm", "model.mlp=gelu", "model.position=learned", "model.bias=true", "model.fused_qkv=true"]
MORE = [
    [*LORA, "quantization=nf4_double", "checkpointing=selective"],
    [*LORA, "quantization=int8", "model.bias=true", "checkpointing=full"],
    [*LORA, "quantization=fp4", "adapter.target_modules=[down_proj]", "adapter.dropout=0.0", "attention=math"],
    ["adapter=lora", "precision=fp32", "quantization=nf4", "quantization.compute_dtype=bf16", "model.tied_head=true"],
    [*LORA, *GPT2, "adapter.train_embeddings=true"],
    ["adapter=lora", "precision=bf16_pure", "quantization=int8"],
    ["adapter=dora", "precision=bf16_mixed"],
    ["adapter=dora", "precision=bf16_mixed", "checkpointing=full"],
    ["adapter=dora", "precision=bf16_mixed", "adapter.dropout=0.0", "model.bias=true", "checkpointing=selective"],
    ["adapter=dora", "precision=bf16_pure"],
    ["adapter=dora", "precision=bf16_pure", "adapter.dropout=0.0", "checkpointing=full"],
    ["adapter=dora", "adapter.target_modules=[o_proj,up_proj]", "train.gradient_accumulation_steps=2"],
    [*LORA, "loss=no_upcast"],  # the peak is in the loss
    [
        *LORA,
        "adapter.target_modules=[q_proj]",
        "train.micro_batch_size=4",
        "model.vocab_size=400",
        "loss=chunked",
    ],  # in a norm
]


def train_all(points: list[list[str]], folder: Path) -> list[dict[str, object]]:
    worker = [sys.executable, str(ROOT / "tests" / "distributed" / "points_worker.py"), str(folder)]
    lines = "".join(json.dumps(p) + "\n" for p in points)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        worker, input=lines, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(points), done.stderr[-3000:]
    return results


def test_every_point_of_the_studies_and_more_is_predicted_to_the_byte(tmp_path: Path) -> None:
    """`lab sweep experiment=qlora model=tiny` point by point, without a torchrun for each."""
    small = ["model=tiny", *small_run(tmp_path, steps=2)]
    studies = [study_points([f"experiment={study}", *small]) for study in ("qlora", "quantization")]
    assert [len(study) for study in studies] == [16, 8]
    points = [list(point.overrides) for study in studies for point in study]
    points += [["measure=ledger", *small, *more] for more in MORE]
    accelerated = ["engine=accelerate", "train.gradient_accumulation_steps=2", "quantization=nf4_double"]
    for family, more in (("llama", ["quantization=nf4_double"]), ("gpt2", []), ("qwen2", accelerated)):
        path = write_config(tmp_path, family)
        own = [s for s in small_run(tmp_path, steps=2) if not s.startswith("model.")]
        hf = ["model=hf", f"model.path={path}", "model.random_weights=true", "data.tokenizer_vocab_size=300"]
        given = {s.partition("=")[0] for s in hf}
        points.append([*(s for s in own if s.partition("=")[0] not in given), *hf, "measure=ledger", *LORA, *more])
    conv1d = hf_overrides(write_config(tmp_path, "gpt2"), "adapter=dora", "measure=ledger")
    conv1d += [s for s in small_run(tmp_path, steps=2) if not s.startswith(("model.", "data.tokenizer", "train.seq"))]
    points += [[*conv1d, "precision=bf16_pure"], [*conv1d, "precision=bf16_mixed"]]
    results = train_all(points, tmp_path)
    # Gradients of the transposed weights that peft makes parameters, which are nobody's.
    unowned: Any = results[-1]["off"]
    assert set(unowned) == {"first_step/backward/unattributed", "steady/backward/unattributed"}
    unowned.clear()
    assert [(p, r) for p, r in zip(points, results, strict=True) if r["status"] != "ok" or r["off"]] == []


@pytest.mark.parametrize(
    "more",
    [
        ["parallel=fsdp", "quantization=nf4_double", "quantization.storage_dtype=bf16", "adapter.save=true"],
        ["parallel=zero2", "quantization=nf4", "parallel.zero.reduce_bucket_size=50000"],
    ],
)
def test_two_ranks(more: list[str], tmp_path: Path) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lab.train",
    ]
    overrides = ["model=tiny", "measure=ledger", *LORA, *small_run(tmp_path), *more]
    done = subprocess.run(
        [*torchrun, *overrides], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=150, check=False
    )
    (path,) = tmp_path.glob("outputs/*/*/record.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["status"] == "ok", done.stderr[-3000:]
    off = off_by(record)
    mesh = 8 if "parallel=fsdp" in more else 0  # DeviceMesh's ranks, which no engine owns
    assert all("unattributed" in moment and bytes_off == mesh for moment, bytes_off in off.items()), off
    if "adapter.save=true" in more:
        assert (path.parent / "adapter" / "adapter_model.safetensors").is_file()
