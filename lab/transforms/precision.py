"""Precision: in which dtype parameters live, where the compute dtype comes from, loss scaling, TF32.

How a precision is applied depends on the engine:

=============  ====================  =========================  ============================
precision      single, ddp           fsdp (FSDP2)               zero1-3 (DeepSpeed)
=============  ====================  =========================  ============================
fp32           fp32                  fp32                       fp32
bf16_mixed     fp32 + autocast       fp32 shards, bf16 gathers  bf16 + fp32 master weights
fp16_mixed     the same + GradScaler  the same + GradScaler      fp16 + fp32 master + scaler
bf16_pure      bf16                  bf16                       bf16 + bf16 master and states
=============  ====================  =========================  ============================
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lab.config import RunConfig
from lab.vocab import Precision

_HALF = {
    Precision.BF16_MIXED: torch.bfloat16,
    Precision.FP16_MIXED: torch.float16,
    Precision.BF16_PURE: torch.bfloat16,
}


def compute_dtype(cfg: RunConfig) -> torch.dtype:
    """The dtype of matmuls, and of attention's inputs."""
    return _HALF.get(cfg.precision.kind, torch.float32)


def parameter_dtype(cfg: RunConfig) -> torch.dtype:
    """The dtype of the module's own parameters (DeepSpeed keeps half weights beside its master copy)."""
    if cfg.parallel.strategy.zero_stage or cfg.precision.kind is Precision.BF16_PURE:
        return compute_dtype(cfg)
    return torch.float32


def autocast(cfg: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Around the forward of single and ddp: autocast in mixed precision, nothing otherwise."""
    if cfg.precision.kind in (Precision.BF16_MIXED, Precision.FP16_MIXED):
        context: AbstractContextManager[Any] = torch.autocast(device.type, compute_dtype(cfg))
        return context
    return nullcontext()


def grad_scaler(cfg: RunConfig, device: torch.device) -> torch.amp.GradScaler | None:
    """Dynamic loss scaling for fp16 where the engine brings none (all but DeepSpeed)."""
    if cfg.precision.kind is Precision.FP16_MIXED and not cfg.parallel.strategy.zero_stage:
        return torch.amp.GradScaler(device.type)
    return None


def deepspeed_section(cfg: RunConfig) -> dict[str, Any]:
    """DeepSpeed's precision section (deepspeed/runtime/precision_config.py), its defaults otherwise.

    bf16_pure keeps master weights and optimizer states in bf16 too (0.19: all three stages; without
    ``bf16_optimizer_states`` bf16 masters would need DeepSpeedCPUAdam and offload).
    """
    match cfg.precision.kind:
        case Precision.FP32:
            return {}
        case Precision.BF16_MIXED:
            return {"bf16": {"enabled": True}}
        case Precision.FP16_MIXED:
            return {"fp16": {"enabled": True}}
        case Precision.BF16_PURE:
            return {
                "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
            }


def apply_tf32(cfg: RunConfig, device: torch.device) -> None:
    """TF32 for fp32 matmuls on a GPU: process-wide, through the one API that never warns.

    The CPU is left alone: there the same switch lets oneDNN use lower precision.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if cfg.precision.tf32 else "highest")
