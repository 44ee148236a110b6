"""Device memory that does not pass through PyTorch's allocator, from the hardware table (configs/hardware)."""

from __future__ import annotations

from lab.config import RunConfig
from lab.vocab import Strategy


def outside_allocator_bytes(cfg: RunConfig) -> int:
    """Idle card + CUDA context + NCCL. 0 on a CPU.

    Each figure is a row of ``configs/hardware/NAME.yaml`` with how it was measured. A single process has no
    communicator; DeepSpeed makes further ones.
    """
    h = cfg.hardware
    if h.device_type != "cuda":
        return 0
    total = h.idle_bytes + h.cuda_context_bytes
    if cfg.parallel.strategy is not Strategy.SINGLE and cfg.world_size > 1:
        total += h.nccl_bytes
        if cfg.parallel.strategy.zero_stage:
            total += h.nccl_deepspeed_bytes
    return total
