"""Draws the points of configs/experiment/h200_blind3.yaml: ``python experiments/h200_blind3/draw.py``.

Every setting is drawn by itself: the default with the chance that the tables below give, else any of the other values;
what only some choice has (an adapter's rank, ZeRO's bucket) is drawn where that choice was. A draw is thrown away if
the lab refuses it; if it is predicted to use more than 60 GiB of the device (no room for other points on the GPU); if
the model has more than 3.5e9 parameters; if a step is more than 1e14 floating point operations; or if the host would be
slow: more than 28 blocks, or more than 56 in all micro-steps together. The prediction plays no other part.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

from lab.analytic import predict
from lab.analytic.architecture import num_parameters
from lab.config import ConfigError, RunConfig, load
from lab.units import GIB
from lab.vocab import Precision

BASE = {"model": "350m", "train.micro_batch_size": "4", "train.seq_len": "1024", "train.steps": "4", "hardware": "h200"}
SEED, ONE_GPU, TWO_GPUS = 20261122, 34, 16
STRATEGIES = {
    1: ["single"] * 12 + ["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op"],
    2: ["ddp", "ddp", "zero1", "zero2", "zero2", "zero3", "fsdp", "fsdp", "fsdp_grad_op", "hsdp"],
}
# Setting -> (chance of the default, the other values).
Draws = dict[str, tuple[float, list[str]]]
DRAWS: Draws = {
    "train.seq_len": (0.3, ["128", "300", "512", "777", "1000", "2048", "2049", "4096", "8192", "16384"]),
    "train.micro_batch_size": (0.3, ["1", "2", "3", "5", "8", "16"]),
    "train.gradient_accumulation_steps": (0.75, ["2", "3", "4"]),
    "train.max_grad_norm": (0.6, ["1.0"]),
    "precision": (0.4, ["fp32", "fp16_mixed", "bf16_pure"]),
    "checkpointing": (0.5, ["full", "selective", "every_k"]),
    "attention": (0.5, ["eager", "math", "mem_efficient", "flash", "cudnn"]),
    "engine": (0.75, ["accelerate"]),
    "adapter": (0.45, ["lora", "lora", "lora", "dora"]),
    "optimizer": (
        0.4,
        ["sgd", "adafactor", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"],
    ),
}
OF_MODEL: dict[str, Draws] = {
    "lab": {
        "model": (0.3, ["25m", "125m", "1b", "3b"]),
        "loss": (0.4, ["no_upcast", "in_place", "chunked"]),
        "model.num_kv_heads": (0.6, ["1", "2", "4", "6"]),
        "model.vocab_size": (0.5, ["8192", "30011", "50257", "100277", "128256"]),
        "model.bias": (0.7, ["true"]),
        "model.norm": (0.7, ["rmsnorm", "layernorm"]),
        "model.mlp": (0.7, ["swiglu", "gelu"]),
        "model.position": (0.7, ["rope", "learned"]),
        "model.fused_qkv": (0.7, ["true"]),
        "model.tied_head": (0.6, ["true"]),
        "model.dropout": (0.8, ["0.1"]),
        "model.num_layers": (0.5, ["3", "7", "10"]),
        "model.intermediate_size": (0.85, ["1999", "5000"]),
        "model.head_dim": (0.9, ["48", "80", "96"]),
    },
    "hf": {
        "model.path": (
            0.0,
            [
                *("configs/hf/llama_1b.json", "configs/hf/llama_7b.json", "configs/hf/llama_8b.json"),
                *("configs/hf/mistral_7b.json", "configs/hf/qwen2_0.5b.json", "configs/hf/qwen2_1.5b.json"),
                *("configs/hf/qwen3_0.6b.json", "configs/hf/gemma_2b.json", "configs/hf/gpt2.json"),
            ],
        ),
        "model.num_layers": (0.1, ["2", "3", "4", "6", "9"]),
    },
}
FOUR_BIT: Draws = {
    "quantization.block_size": (0.6, ["128", "256", "1024"]),
    "quantization.compute_dtype": (0.6, ["fp16", "fp32"]),
    "quantization.storage_dtype": (0.5, ["bf16", "fp16", "fp32"]),
}
# In order: what an earlier line draws may be what a later one is drawn for.
OF_CHOICE: dict[str, Draws] = {
    "parallel=ddp": {
        "parallel.ddp.gradient_as_bucket_view": (0.5, ["true"]),
        "parallel.ddp.bucket_cap_mb": (0.5, ["1", "100"]),
        "parallel.ddp.static_graph": (0.85, ["true"]),
    },
    "parallel=zero": {
        "parallel.zero.reduce_bucket_size": (0.5, ["5000000", "100000000"]),
        "parallel.zero.overlap_comm": (0.7, ["true", "false"]),
        "parallel.zero.contiguous_gradients": (0.85, ["false"]),
        "parallel.zero.reduce_scatter": (0.85, ["false"]),
        "parallel.zero.round_robin_gradients": (0.85, ["true"]),
    },
    "parallel=zero3": {
        "parallel.zero.stage3_max_live_parameters": (0.5, ["30000000", "300000000"]),
        "parallel.zero.stage3_param_persistence_threshold": (0.7, ["0", "10000"]),
        "parallel.zero.sub_group_size": (0.7, ["50000000"]),
    },
    "parallel=fsdp": {"parallel.fsdp.reduce_dtype": (0.6, ["param"])},
    "parallel=hsdp": {"parallel.fsdp.reduce_dtype": (0.6, ["param"])},
    "loss=chunked": {"loss.num_chunks": (0.5, ["3", "16"])},
    "checkpointing=every_k": {"checkpointing.every_k": (0.6, ["3"])},
    "optimizer=adamw": {"optimizer.implementation": (0.4, ["foreach", "for_loop"])},
    "optimizer=sgd": {
        "optimizer.implementation": (0.5, ["fused", "for_loop"]),
        "optimizer.momentum": (0.7, ["0"]),
    },
    "optimizer=adafactor": {"optimizer.implementation": (0.5, ["foreach"])},
    "optimizer=adamw_8bit": {"optimizer.min_8bit_size": (0.8, ["0", "1000000"])},
    "precision=fp32": {"precision.tf32": (0.8, ["false"])},
    "adapter=": {
        "adapter.rank": (0.4, ["4", "8", "64"]),
        "adapter.dropout": (0.5, ["0.0"]),
        "adapter.target_modules": (0.6, ["[q_proj,v_proj]", "[o_proj,down_proj]", "[c_attn]", "[gate_proj,up_proj]"]),
        "adapter.train_embeddings": (0.8, ["true"]),
    },
    "adapter=lora": {"quantization": (0.2, ["int8", "fp4", "nf4", "nf4_double"])},
    "quantization=": {
        "adapter.prepare_kbit": (0.6, ["false"]),
        "quantization.skip_modules": (0.85, ["[head,lm_head,o_proj]"]),
    },
    "quantization=fp4": FOUR_BIT,
    "quantization=nf4": FOUR_BIT,
}


def drawn(rng: random.Random, world_size: int) -> list[str]:
    """One point's overrides, not yet checked."""
    settings = {"parallel": rng.choice(STRATEGIES[world_size]), "world_size": str(world_size)}
    kind = "lab" if rng.random() < 0.6 else "hf"
    if kind == "hf":
        settings |= {"model": "hf", "model.random_weights": "true"}
    settings |= _draw(rng, OF_MODEL[kind]) | _draw(rng, DRAWS)
    for choice, draws in OF_CHOICE.items():
        if any(f"{k}={v}".startswith(choice) for k, v in {"optimizer": "adamw", **settings}.items()):
            settings |= _draw(rng, draws)
    return [f"{k}={v}" for k, v in settings.items()]


def _draw(rng: random.Random, draws: Draws) -> dict[str, str]:
    return {k: rng.choice(others) for k, (chance, others) in draws.items() if rng.random() >= chance}


def accepted(settings: list[str]) -> RunConfig | None:
    """The configuration, if the lab takes it and host and GPU are quick with it; the prediction is not asked yet."""
    given = dict(s.split("=", 1) for s in settings)
    try:
        cfg = load([f"{k}={v}" for k, v in {**BASE, **given}.items()])
    except ConfigError:
        return None
    blocks = cfg.model.num_layers * cfg.train.gradient_accumulation_steps
    quick = cfg.model.num_layers <= 28 and blocks <= 56 and operations(cfg) <= 1e14
    return cfg if quick and num_parameters(cfg.model) <= 3.5e9 else None


def operations(cfg: RunConfig) -> float:
    """Of one rank's step: 6 per parameter and token and attention's, eight times as slow in fp32."""
    t, m = cfg.train, cfg.model
    tokens = t.micro_batch_size * t.seq_len * t.gradient_accumulation_steps
    attention = 12 * m.num_layers * m.num_heads * m.head_dim * t.seq_len
    return tokens * (6.0 * num_parameters(m) + attention) * (8 if cfg.precision.kind is Precision.FP32 else 1)


def points(seed: int, one_gpu: int, two_gpus: int) -> Iterator[tuple[list[str], RunConfig]]:
    """The points of a seed, ``one_gpu`` of them on one and ``two_gpus`` on two."""
    rng = random.Random(seed)
    for world_size, wanted in ((1, one_gpu), (2, two_gpus)):
        found = 0
        while found < wanted:
            settings = drawn(rng, world_size)
            cfg = accepted(settings)
            if cfg is not None and predict(cfg).steady.device_used_bytes <= 60 * GIB:
                found += 1
                yield settings, cfg


def main() -> int:
    for settings, _ in points(SEED, ONE_GPU, TWO_GPUS):
        print(f"  - {' '.join(settings)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
