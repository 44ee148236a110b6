"""Draws the points of configs/experiment/h200_blind2.yaml: ``python experiments/h200_blind2/draw.py``.

Every setting is drawn by itself: the default with the chance that ``DRAWS`` gives, else any of the other values. A
draw is thrown away if the lab refuses it, if it is predicted to need more than 100 GiB (no room for other points on
the GPU), or if a step is more than 3e14 floating point operations. The prediction plays no other part.
"""

from __future__ import annotations

import random
import sys

from lab.analytic import predict
from lab.analytic.architecture import num_parameters
from lab.config import ConfigError, RunConfig, load
from lab.units import GIB
from lab.vocab import Precision

SEED, ONE_GPU, TWO_GPUS = 20261121, 18, 12
STRATEGIES = {
    1: ["single"] * 12 + ["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op"],
    2: ["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op", "hsdp"],
}
# Setting -> (chance of the default, the other values).
DRAWS: dict[str, tuple[float, list[str]]] = {
    "model": (0.3, ["25m", "125m", "1b", "3b"]),
    "train.seq_len": (0.3, ["128", "300", "512", "777", "2048", "4096", "8192", "16384", "32768"]),
    "train.micro_batch_size": (0.3, ["1", "3", "5", "8", "16", "32"]),
    "train.gradient_accumulation_steps": (0.75, ["2", "3", "4"]),
    "train.max_grad_norm": (0.6, ["1.0"]),
    "precision": (0.4, ["fp32", "fp16_mixed", "bf16_pure"]),
    "checkpointing": (0.5, ["full", "selective", "every_k"]),
    "attention": (0.5, ["eager", "math", "mem_efficient", "flash", "cudnn"]),
    "loss": (0.5, ["in_place", "chunked"]),
    "optimizer": (0.8, ["sgd"]),
    "optimizer.implementation": (0.6, ["fused", "foreach", "for_loop"]),
    "model.num_kv_heads": (0.6, ["1", "2", "4", "6"]),
    "model.vocab_size": (0.5, ["8192", "30011", "50257", "100277", "128256"]),
    "model.bias": (0.7, ["true"]),
    "model.norm": (0.7, ["rmsnorm", "layernorm"]),
    "model.mlp": (0.7, ["swiglu", "gelu"]),
    "model.position": (0.7, ["rope", "learned"]),
    "model.fused_qkv": (0.7, ["true"]),
    "model.tied_head": (0.6, ["true"]),
    "model.dropout": (0.8, ["0.1"]),
    "model.num_layers": (0.7, ["3", "7", "10"]),
}
OF_STRATEGY: dict[str, dict[str, tuple[float, list[str]]]] = {
    "ddp": {
        "parallel.ddp.gradient_as_bucket_view": (0.5, ["true"]),
        "parallel.ddp.bucket_cap_mb": (0.5, ["1", "100"]),
    },
    "zero": {
        "parallel.zero.reduce_bucket_size": (0.5, ["5000000", "100000000"]),
        "parallel.zero.overlap_comm": (0.7, ["true", "false"]),
    },
    "zero3": {
        "parallel.zero.stage3_max_live_parameters": (0.5, ["30000000", "300000000"]),
        "parallel.zero.stage3_param_persistence_threshold": (0.7, ["0", "10000"]),
    },
    "fsdp": {"parallel.fsdp.reduce_dtype": (0.6, ["param"])},
}


def drawn(rng: random.Random, world_size: int) -> list[str]:
    """One point's overrides, not yet checked."""
    strategy = rng.choice(STRATEGIES[world_size])
    settings = [f"parallel={strategy}", f"world_size={world_size}"]
    own = {k: v for prefix, draws in OF_STRATEGY.items() if strategy.startswith(prefix) for k, v in draws.items()}
    if strategy == "hsdp":
        own = OF_STRATEGY["fsdp"]
    for setting, (chance_of_default, others) in {**DRAWS, **own}.items():
        if rng.random() >= chance_of_default:
            settings.append(f"{setting}={rng.choice(others)}")
    return settings


def can_run(settings: list[str]) -> bool:
    """Does the lab take it, and is it small enough?"""
    try:
        cfg = load(["experiment=h200_blind2", "hardware=h200", *settings])
    except ConfigError:
        return False
    return operations(cfg) <= 3e14 and predict(cfg).steady.device_used_bytes <= 100 * GIB


def operations(cfg: RunConfig) -> float:
    """Of one rank's step: 6 per parameter and token and attention's, eight times as slow in fp32."""
    t, m = cfg.train, cfg.model
    tokens = t.micro_batch_size * t.seq_len * t.gradient_accumulation_steps
    attention = 12 * m.num_layers * m.num_heads * m.head_dim * t.seq_len
    return tokens * (6.0 * num_parameters(m) + attention) * (8 if cfg.precision.kind is Precision.FP32 else 1)


def main() -> int:
    rng = random.Random(SEED)
    for world_size, wanted in ((1, ONE_GPU), (2, TWO_GPUS)):
        found = 0
        while found < wanted:
            settings = drawn(rng, world_size)
            if can_run(settings):
                found += 1
                print(f"  - {' '.join(settings)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
