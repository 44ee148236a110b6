"""The trained adapter, gathered from whatever engine trained it, to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lab.transforms.adapters import adapter_state, save_adapter


def save_trained_adapter(engine: Any, folder: Path) -> None:
    """Every rank gathers, rank 0 writes. The engine has trained; it may be closed afterwards."""
    model, whole = trained_module(engine), getattr(engine, "whole", _whole)
    state = adapter_state(model, whole)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and ".default." not in n]
    embedding = whole(trained[0]).detach().cpu() if trained else None
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_adapter(model, folder, state, embedding)


def trained_module(engine: Any) -> nn.Module:
    """The model without what DDP or DeepSpeed puts around it."""
    for name in ("decoder", "model"):
        if isinstance(module := getattr(engine, name, None), nn.Module):
            return module
    module = engine.engine.module
    assert isinstance(module, nn.Module)
    return module


def _whole(parameter: nn.Parameter) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data
