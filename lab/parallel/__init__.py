"""Strategies: one file per family, each saying how its library is told to apply it and who owns which tensor."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from lab.config import RunConfig
from lab.parallel.engine import Engine, LiveTensor
from lab.vocab import Strategy

# Strategy -> (module, class); imported when used, so that only ZeRO runs import DeepSpeed.
ENGINES: dict[Strategy, tuple[str, str]] = {
    Strategy.SINGLE: ("replicated", "ReplicatedEngine"),
    Strategy.DDP: ("replicated", "ReplicatedEngine"),
    Strategy.ZERO1: ("zero", "ZeroEngine"),
    Strategy.ZERO2: ("zero", "ZeroEngine"),
    Strategy.ZERO3: ("zero", "ZeroEngine"),
    Strategy.FSDP: ("fsdp", "FSDPEngine"),
    Strategy.FSDP_GRAD_OP: ("fsdp", "FSDPEngine"),
    Strategy.HSDP: ("fsdp", "FSDPEngine"),
}


def import_engine(cfg: RunConfig) -> Any:
    """The engine's class and its library: seconds of imports that touch no GPU memory."""
    if cfg.engine.kind == "accelerate":
        return import_module("lab.parallel.accelerate_engine").import_engine(cfg)
    module, name = ENGINES[cfg.parallel.strategy]
    file = import_module(f"lab.parallel.{module}")
    if cfg.parallel.strategy.zero_stage:
        file.import_deepspeed(torch.device(cfg.hardware.device_type))
    return getattr(file, name)


def build_engine(cfg: RunConfig, model: nn.Module, device: torch.device) -> Engine:
    """A meta model, transforms applied -> sharded or replicated, materialised, with its optimizer.

    Needs a process group for every strategy but ``single``.
    """
    engine: Engine = import_engine(cfg)(cfg, model, device)
    return engine


__all__ = ["ENGINES", "Engine", "LiveTensor", "build_engine", "import_engine"]
