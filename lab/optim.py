"""The optimizer and the learning rate: torch.optim with the implementation asked for, or bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lab.config import OptimizerConfig, RunConfig
from lab.transforms.bnb_optimizers import CLASSES, build_bnb_optimizer


def build_optimizer(parameters: Iterable[nn.Parameter], cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """One parameter group, weight decay on everything (so that ZeRO keeps one flat partition).

    ``implementation``: fused | foreach | for_loop, the flags of torch.optim. Fused keeps AdamW's step
    counters on the device (4 bytes per tensor), the others on the host. Adafactor keeps torch's beta2_decay, eps and d.
    """
    params = list(parameters)
    if cfg.kind in CLASSES:
        return build_bnb_optimizer(params, cfg)
    foreach = cfg.implementation == "foreach"
    if cfg.kind == "adafactor":
        return torch.optim.Adafactor(params, lr=cfg.lr, weight_decay=cfg.weight_decay, foreach=foreach)
    common: dict[str, Any] = {
        "lr": cfg.lr,
        "weight_decay": cfg.weight_decay,
        "fused": cfg.implementation == "fused",
        "foreach": foreach,
    }
    if cfg.kind == "sgd":
        return torch.optim.SGD(params, momentum=cfg.momentum, **common)
    return torch.optim.AdamW(params, betas=cfg.betas, eps=cfg.eps, **common)


def learning_rate(cfg: RunConfig, step: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then constant."""
    warmup = cfg.train.warmup_steps
    return cfg.optimizer.lr * min(1.0, (step + 1) / warmup) if warmup else cfg.optimizer.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Plain host-side floats: no device tensor is added."""
    for group in optimizer.param_groups:
        group["lr"] = value


def scaled_step(
    cfg: RunConfig,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    parameters: list[nn.Parameter],
) -> bool:
    """Clip the global gradient norm (foreach) where asked, then step; with fp16 loss scaling around both.

    Parameters may be DTensors: the norm and the search for infinities then agree over ranks.
    True: the optimizer's step ran. False: the scaler found an overflow and left it out. A fused optimizer's step always
    runs, with the memory of any other: on an overflow its kernels write nothing (torch/amp/grad_scaler.py, step).
    """
    if cfg.train.max_grad_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, cfg.train.max_grad_norm)
    if scaler is None:
        optimizer.step()
        return True
    # The scaler reads the overflow on the host and does not tell: whether it called the optimizer costs no second wait.
    runs: list[None] = []
    hook = optimizer.register_step_post_hook(lambda *_: runs.append(None))
    scaler.step(optimizer)
    hook.remove()
    scaler.update()
    return bool(runs)
