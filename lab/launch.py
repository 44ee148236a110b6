"""Where this process stands among the ranks: torchrun's environment, the device, the store, the process group."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from lab.config import ConfigError, RunConfig
from lab.measure.device_use import gpu_uses
from lab.track import new_run_id
from lab.track.folder import TURN_VARIABLE
from lab.vocab import Strategy


def wait_for_turn(get_ready: Callable[[], None]) -> None:
    """Under ``lab sweep --ahead``: get ready, then wait for the file by which the driver says that the GPU is free."""
    path = os.environ.get(TURN_VARIABLE)
    if path:
        get_ready()
    while path and not os.path.exists(path):
        time.sleep(0.02)


@dataclass(frozen=True)
class Place:
    rank: int
    local_rank: int
    device: torch.device
    gpu_uses_before: Mapping[str, int] = field(default_factory=dict)  # bytes by UUID, before this process touched one


def find_place(cfg: RunConfig) -> Place:
    """Rank and device of this process; threads on a CPU shared by ranks. Raises ConfigError, touches no GPU memory."""
    if "WORLD_SIZE" not in os.environ:
        if cfg.world_size != 1:
            raise ConfigError(
                "world_size", cfg.world_size, f"start it with torchrun --standalone --nproc-per-node {cfg.world_size}"
            )
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if cfg.hardware.device_type == "cpu":
        if cfg.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        return Place(rank, local_rank, torch.device("cpu"))
    given = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    if not cfg.train.expandable_segments and "expandable_segments:true" in given.lower().replace(" ", ""):
        raise ConfigError("train.expandable_segments", False, f"true, which the environment asks for: {given}")
    uses = gpu_uses()  # before PyTorch looks at the GPU
    if not torch.cuda.is_available():
        raise ConfigError("hardware", cfg.hardware.name, "PyTorch sees no GPU here; hardware=cpu runs without one")
    # The same answer on every rank of the node: rank 0 must be among those that refuse, and say why.
    if (local_ranks := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > torch.cuda.device_count():
        raise ConfigError(
            "world_size", cfg.world_size, f"{local_ranks} ranks on a node that has {torch.cuda.device_count()} GPUs"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return Place(rank, local_rank, device, uses)


def check_allocator(cfg: RunConfig, device: torch.device) -> None:
    """Is train.expandable_segments what PyTorch's allocator really does? Raises RuntimeError: the run must not go on.

    To be asked when something is allocated.
    """
    if device.type != "cuda":
        return
    found = has_expandable_segments(device)
    if found is not cfg.train.expandable_segments:
        raise RuntimeError(
            f"train.expandable_segments={str(cfg.train.expandable_segments).lower()}, but PyTorch's allocator "
            f"{'has' if found else 'made no'} expandable segments: see PYTORCH_ALLOC_CONF, PYTORCH_CUDA_ALLOC_CONF"
        )


def has_expandable_segments(device: torch.device) -> bool:
    """Whether PyTorch's allocator has made such segments, which its settings at the first allocation decide."""
    return device.type == "cuda" and any(s.get("is_expandable") for s in torch.cuda.memory_snapshot())


def limit_memory(cfg: RunConfig, device: torch.device) -> None:
    """train.memory_limit_gib, before anything is allocated. Raises ConfigError for more than the GPU has.

    PyTorch takes a fraction of the GPU's memory and cuts the product to whole bytes (CUDACachingAllocator.cpp,
    setMemoryFraction): half a byte more keeps it from ending one byte short.
    """
    limit = cfg.memory_limit_bytes
    if limit is None:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if limit >= total:
        raise ConfigError("train.memory_limit_gib", cfg.train.memory_limit_gib, f"less than the GPU's {total} B")
    torch.cuda.set_per_process_memory_fraction((limit + 0.5) / total, device)


def open_store(cfg: RunConfig) -> dist.Store | None:
    """The key-value store that all ranks reach (torchrun's own), before any process group; None for one rank."""
    if cfg.world_size == 1:
        return None
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def share_run_id(store: dist.Store | None, rank: int) -> str:
    """One run id for all ranks: rank 0's."""
    if store is None:
        return new_run_id()
    if rank == 0:
        store.set("lab/run_id", new_run_id())
    return bytes(store.get("lab/run_id")).decode()


def share_pids(store: dist.Store | None, cfg: RunConfig, place: Place) -> dict[int, int]:
    """Rank -> process id of the other ranks on this node; waits until all of them are there."""
    if store is None:
        return {}
    first = place.rank - place.local_rank
    local = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", cfg.world_size)))
    store.set(f"lab/pid/{place.rank}", str(os.getpid()))
    return {rank: int(store.get(f"lab/pid/{rank}")) for rank in local if rank != place.rank}


def open_process_group(cfg: RunConfig, place: Place, store: dist.Store | None) -> None:
    """NCCL on GPUs, gloo on CPUs; for one rank too where the strategy needs a group (all but single)."""
    if cfg.parallel.strategy is Strategy.SINGLE:
        return
    if store is None:
        store = dist.HashStore()
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=cfg.world_size)


def close_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
