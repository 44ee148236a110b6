"""Memory measured: allocator counters by step and phase, ledgers of live tensors, snapshots, on every rank.

This side reads storages and counters. It never imports a prediction.
"""

from __future__ import annotations

import torch

from lab.config import RunConfig
from lab.measure.backend import make_backend
from lab.measure.cpu_tracker import StorageTracker
from lab.measure.gather import gather
from lab.measure.phases import AllocatorMeter, Meter

__all__ = ["AllocatorMeter", "Meter", "StorageTracker", "gather", "make_meter"]


def make_meter(cfg: RunConfig, device: torch.device, rank: int, local_rank: int) -> Meter:
    """The meter that ``cfg.measure`` asks for."""
    if cfg.measure.level == "off":
        return Meter(rank, local_rank)
    return AllocatorMeter(make_backend(device), device, rank, local_rank)
