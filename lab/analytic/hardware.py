"""Device memory that does not pass through PyTorch's allocator, from the hardware table (configs/hardware)."""

from __future__ import annotations

from lab.config import RunConfig
from lab.vocab import Strategy


def outside_allocator_bytes(cfg: RunConfig) -> int:
    """Idle card + CUDA context + NCCL. 0 on a CPU.

    Each figure is a row of ``configs/hardware/NAME.yaml`` with how it was measured (`lab hardware`). A single
    process has no communicator, HSDP has two. Left out: up to 86 MiB by which runs differ with the kernels they
    load (CUDA loads modules lazily), and NCCL's library under FSDP on one GPU.
    """
    h = cfg.hardware
    if h.device_type != "cuda":
        return 0
    total = h.idle_bytes + h.cuda_context_bytes
    strategy = cfg.parallel.strategy
    if cfg.world_size == 1:
        return total + (h.nccl_one_rank_bytes if strategy.zero_stage else 0)
    total += h.nccl_bytes
    if strategy.zero_stage:
        total += h.nccl_deepspeed_bytes
    if strategy is Strategy.HSDP and 1 < cfg.fsdp_shard_size < cfg.world_size:
        total += h.nccl_further_bytes
    return total
