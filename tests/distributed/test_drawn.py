"""Points that random draws found to be predicted wrongly, trained on a CPU: to the byte since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.small_run import small_run
from tests.distributed.test_qlora import train_all
from tests.unit.hf_cases import hf_overrides, write_config

VIEW = "parallel.ddp.gradient_as_bucket_view=true"
DDP = ["parallel=ddp", "world_size=1"]
BF16_AND_FP32 = ["precision=bf16_pure", "adapter=lora", "adapter.train_embeddings=true"]
FOREACH = ["optimizer.implementation=foreach"]
FP16_PRODUCTS = ["quantization=nf4", "quantization.compute_dtype=fp16", "adapter.prepare_kbit=false"]
POINTS = [
    # the first backward's gradients go into the bucket when it is over; the third step makes the buckets anew
    [*DDP, "parallel.ddp.static_graph=true", VIEW, "parallel.ddp.bucket_cap_mb=0.1"],
    [*DDP, "parallel.ddp.static_graph=true", "precision=bf16_pure"],
    # gradients of a micro-step before the last are not in the buckets
    [*DDP, VIEW, "train.gradient_accumulation_steps=2"],
    # F.linear inside of bitsandbytes' function is what a selective policy keeps
    ["adapter=lora", "quantization=int8", "checkpointing=selective"],
    # the loss is the peak: gather's gradient is written into a copy
    ["adapter=lora", "loss=no_upcast", "train.micro_batch_size=2"],
    # foreach takes one type after the other: bf16 embeddings, fp32 adapters; one chunk's loss is the forward's peak
    [*BF16_AND_FP32, "optimizer=sgd", *FOREACH, "optimizer.weight_decay=0.1", "loss=chunked", "loss.num_chunks=1"],
    [*BF16_AND_FP32, "optimizer=adafactor", *FOREACH],
    # bf16 and fp16 are two types of one size: bitsandbytes casts there and back
    ["precision=bf16_pure", "adapter=lora", "adapter.target_modules=[k_proj]", *FP16_PRODUCTS, "loss=chunked"],
    # Accelerator.no_sync does nothing with one process; the first step is off, so this comes last
    [*DDP, "engine=accelerate", VIEW, "train.gradient_accumulation_steps=2"],
]


def test_drawn_points_are_predicted_to_the_byte(tmp_path: Path) -> None:
    small = ["model=tiny", "measure=ledger", *small_run(tmp_path, steps=4)]
    points = [[*small, *point] for point in POINTS]
    # dropout's noise is kept before the product is made, which an early-stopped recomputation therefore never makes
    dropped = ["model.dropout=0.1", "checkpointing=full", "train.micro_batch_size=2", "model.vocab_size=512"]
    one_layer = [s.replace("num_layers=2", "num_layers=1") for s in small]
    points.insert(0, [*one_layer, "precision=fp32", "model.intermediate_size=40", *dropped])
    # positions, the mask and rotary tables are bound to a checkpointed layer, GPT-2's positions too; a frozen
    # embedding's output is a leaf there, with a gradient
    rest = [s for s in small_run(tmp_path, steps=4) if not s.startswith(("model.", "data.tokenizer", "train.seq"))]
    every = ["checkpointing=full", "measure=ledger", *rest]
    for family, more in (("llama", "attention=eager"), ("gpt2", "adapter=lora"), ("qwen2", "adapter=lora")):
        points.insert(0, hf_overrides(write_config(tmp_path, family), *every, more))
    results = train_all(points, tmp_path)
    steady: list[Any] = [
        {k: v for k, v in dict(r["off"]).items() if k.startswith("steady") or i < len(points) - 1}  # type: ignore[call-overload]
        for i, r in enumerate(results)
    ]
    found = zip(points, results, steady, strict=True)
    assert [(p, r["status"], off) for p, r, off in found if r["status"] != "ok" or off] == []
