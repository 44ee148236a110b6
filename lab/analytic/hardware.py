"""Device memory that does not pass through PyTorch's allocator, from the hardware table (configs/hardware)."""

from __future__ import annotations

from lab.config import RunConfig
from lab.vocab import AttentionBackend, Precision, Strategy


def outside_allocator_bytes(cfg: RunConfig) -> int:
    """Idle card + CUDA context + NCCL. 0 on a CPU.

    Each figure is a row of ``configs/hardware/NAME.yaml`` with how it was measured (`lab hardware`). A single
    process has no communicator, some runs have two (``communicators``). On one GPU FSDP2 makes a communicator and calls
    no collective on it (_fsdp_collectives.py); DDP and DeepSpeed do. Left out: some MiB by which runs differ with the
    kernels they load (CUDA loads modules lazily).
    """
    h = cfg.hardware
    if h.device_type != "cuda":
        return 0
    total = h.idle_bytes + h.cuda_context_bytes + (h.cudnn_bytes if asks_cudnn(cfg) else 0)
    if cfg.quantization.kind == "int8":
        total += h.bitsandbytes_int8_bytes
    strategy, further = cfg.parallel.strategy, communicators(cfg) - 1
    if further < 0:
        return total
    if cfg.world_size == 1:
        if strategy.is_fsdp:
            return total + h.nccl_idle_bytes
        return total + h.nccl_one_rank_bytes + further * h.nccl_one_rank_further_bytes
    return (
        total + h.nccl_bytes + further * h.nccl_further_bytes + (h.nccl_deepspeed_bytes if strategy.zero_stage else 0)
    )


def communicators(cfg: RunConfig) -> int:
    """NCCL communicators of one process.

    HSDP's shards and replicas have groups of their own. DeepSpeed clones the world's group (utils/groups.py,
    _clone_world_group) and reduces over the clone. ZeRO-3's parameters belong to the world's own group, where they are
    gathered, reduced and normed (partition_parameters.py, ds_process_group); the clone is used only where fp16 asks all
    ranks for overflows (stage3.py, has_overflow). A Trainer gathers counts and losses over the world's group, and
    its models, cut up after they were made, belong to the clone.
    """
    strategy = cfg.parallel.strategy
    if strategy is Strategy.SINGLE or cfg.is_unwrapped_ddp:
        return 0
    if strategy is Strategy.HSDP and 1 < cfg.fsdp_shard_size < cfg.world_size:
        return 2
    if cfg.engine.kind == "hf_trainer" and strategy.zero_stage:
        return 2 if cfg.world_size > 1 else 1
    return 2 if strategy is Strategy.ZERO3 and cfg.precision.kind is Precision.FP16_MIXED else 1


def asks_cudnn(cfg: RunConfig) -> bool:
    """Is cuDNN asked whether it can do the attention? PyTorch's own choice asks it first for half precision.

    sdp_utils.cpp, priority order on sm_90; it stays loaded where another kernel then does the work.
    """
    backend = cfg.attention.backend
    automatic = backend is AttentionBackend.AUTO and cfg.precision.kind is not Precision.FP32
    return automatic or backend is AttentionBackend.CUDNN
