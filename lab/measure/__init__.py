"""Memory measured: allocator counters by step and phase, ledgers of live tensors, snapshots, on every rank.

This side reads storages and counters. It never imports a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lab.config import RunConfig
from lab.measure.backend import make_backend
from lab.measure.cpu_tracker import StorageTracker
from lab.measure.device_use import DeviceUse
from lab.measure.gather import gather
from lab.measure.ledger import Ledger
from lab.measure.meter import LiveTensors, Meter
from lab.measure.phases import AllocatorMeter
from lab.vocab import Checkpointing

__all__ = ["AllocatorMeter", "Ledger", "LiveTensors", "Meter", "StorageTracker", "gather", "make_meter"]


def make_meter(
    cfg: RunConfig, device: torch.device, rank: int, local_rank: int, gpu_uses_before: Mapping[str, int] | None = None
) -> Meter:
    """The meter that ``cfg.measure`` asks for: off, or counters with ledgers and a snapshot where wanted.

    ``gpu_uses_before``: `device_use.gpu_uses` from before this process touched a GPU, where that was still to be had.
    """
    level, steps = cfg.measure.level, cfg.train.steps
    if level == "off":
        return Meter(rank, local_rank, torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    ledger_steps = range(steps) if level == "ledger" else frozenset(s % steps for s in cfg.measure.ledger_steps)
    backend = make_backend(device)
    if cfg.train.compile and ledger_steps:
        backend.notes.append("train.compile: no ledgers, since hooks on saved tensors would compile another graph")
        ledger_steps = frozenset()
    if cfg.train.compile and device.type == "cpu":
        backend.notes.append("train.compile: nothing is compiled while the CPU tracker's dispatch mode is on")
    workspaces = (cfg.hardware.cublas_workspace_bytes, cfg.hardware.cublaslt_workspace_bytes)
    kind = cfg.checkpointing.kind
    bound = kind is not Checkpointing.NONE and cfg.model.family != "lab"
    ledger = Ledger(cfg.model.vocab_size, workspaces, kind is Checkpointing.SELECTIVE, bound)
    if cfg.vocab_size_is_ambiguous:
        backend.notes.append("model.vocab_size equals another width: its activations count as logits_and_loss")
    return AllocatorMeter(
        backend,
        device,
        rank,
        local_rank,
        ledger=ledger if ledger_steps else None,
        ledger_steps=ledger_steps,
        snapshot_step=steps - 1 if level == "snapshot" else None,
        device_use=DeviceUse(device, gpu_uses_before, cfg.hardware.idle_bytes),
    )
