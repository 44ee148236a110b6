"""Optimizers of bitsandbytes: AdamW and Lion with 8-bit states, and AdamW with states in CUDA managed memory.

Source: bitsandbytes 0.50, optim/optimizer.py. States are made at the first step: per tensor uint8 codes with one
fp32 maximum per 256 elements, fp32 below ``min_8bit_size`` elements. Paged ones keep the states of tensors from
1e5 elements on in managed memory (cudaMallocManaged): the driver moves its pages between GPU and host, and no
allocator of PyTorch's knows of it. On a CPU there is no managed memory, and the states are plain tensors.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from lab.config import OptimizerConfig
from lab.config.limits import check_elements
from lab.transforms.bnb import import_bitsandbytes

CLASSES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "lion_8bit": "Lion8bit",
}


def build_bnb_optimizer(params: list[nn.Parameter], cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """One parameter group. Lion has one state and no eps."""
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)  # the record says it
    settings: dict[str, Any] = {
        "lr": cfg.lr,
        "betas": cfg.betas,
        "weight_decay": cfg.weight_decay,
        "min_8bit_size": cfg.min_8bit_size,
    }
    if cfg.kind != "lion_8bit":
        settings["eps"] = cfg.eps
    optimizer: torch.optim.Optimizer = getattr(import_bitsandbytes().optim, CLASSES[cfg.kind])(params, **settings)
    return optimizer


def check_sizes(optimizer: torch.optim.Optimizer, cfg: OptimizerConfig) -> None:
    """ConfigError where a tensor is too large for the kernels (a ZeRO partition may be): they would update a part."""
    if cfg.kind not in CLASSES:
        return
    check_elements(cfg.kind, max((p.numel() for group in optimizer.param_groups for p in group["params"]), default=0))


def managed_bytes(cfg: OptimizerConfig, device: torch.device) -> int | None:
    """Bytes of this process's paged states; None where nothing is paged."""
    if not cfg.kind.startswith("paged_") or device.type == "cpu":
        return None
    manager = import_bitsandbytes().functional.GlobalPageManager.get_instance()
    return sum(int(tensor.numel() * tensor.element_size()) for tensor in manager.paged_tensors)


def paged_notes(cfg: OptimizerConfig, device: torch.device) -> list[str]:
    """What the record should say where bitsandbytes does not do what the optimizer's name promises."""
    if cfg.kind.startswith("paged_") and device.type == "cpu":
        return [f"optimizer={cfg.kind}: bitsandbytes does not page on a CPU; its states were plain tensors"]
    return []
