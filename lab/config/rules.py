"""Every rule that one setting alone cannot check. Each violation is one ConfigError.

In reading order: model, training, data, measuring, precision, attention, loss, optimizer and checkpointing,
strategy. What a single setting may be is in ``lab.config.limits``.
"""

from __future__ import annotations

import glob
import os
from importlib.util import find_spec

from lab.config.accelerate import check_engine
from lab.config.errors import ConfigError
from lab.config.finetuning import check_finetuning, upcast_beside_quantized
from lab.config.hf_rules import check_hf
from lab.config.limits import check_limits
from lab.config.schema import RunConfig
from lab.vocab import AttentionBackend, Checkpointing, Precision, Strategy

BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit")


def check_rules(cfg: RunConfig) -> None:
    """Raise ConfigError for the first rule that ``cfg`` breaks."""
    check_limits(cfg)
    for rule in (_model, _train, _data, _measure, _precision, _attention, _loss_and_optimizer, _strategy):
        rule(cfg)
    check_engine(cfg)
    check_hf(cfg)
    check_finetuning(cfg)


def _model(cfg: RunConfig) -> None:
    m = cfg.model
    if m.num_heads % m.num_kv_heads:
        raise ConfigError("model.num_kv_heads", m.num_kv_heads, f"must divide model.num_heads={m.num_heads}")
    if m.position == "rope" and m.head_dim % 2:
        raise ConfigError("model.head_dim", m.head_dim, "must be even with model.position=rope")
    if not 0.0 <= m.dropout < 1.0:
        raise ConfigError("model.dropout", m.dropout, "a probability, 0 or more and less than 1")


def _train(cfg: RunConfig) -> None:
    t = cfg.train
    if t.seq_len > cfg.model.max_seq_len:
        raise ConfigError("train.seq_len", t.seq_len, f"at most model.max_seq_len={cfg.model.max_seq_len}")
    if t.max_grad_norm is not None and not t.max_grad_norm > 0:
        raise ConfigError("train.max_grad_norm", t.max_grad_norm, "positive, or null for no clipping")
    if t.expandable_segments and cfg.hardware.device_type == "cpu":
        raise ConfigError("train.expandable_segments", True, "needs a GPU: it is a setting of PyTorch's CUDA allocator")
    if t.memory_limit_gib is not None:
        _memory_limit(cfg, t.memory_limit_gib)
    if t.warmup_steps > t.steps:
        raise ConfigError("train.warmup_steps", t.warmup_steps, f"at most train.steps={t.steps}")
    for step in cfg.measure.ledger_steps:
        if not -t.steps <= step < t.steps:
            raise ConfigError(
                "measure.ledger_steps", list(cfg.measure.ledger_steps), f"steps from {-t.steps} to {t.steps - 1}"
            )
    if t.compile and cfg.measure.level in ("ledger", "snapshot"):
        raise ConfigError("train.compile", True, "its memory is not modelled; use measure=counters or measure=off")


def _memory_limit(cfg: RunConfig, gib: float) -> None:
    if not gib > 0:
        raise ConfigError("train.memory_limit_gib", gib, "positive, or null for no limit")
    if cfg.hardware.device_type == "cpu":
        raise ConfigError("train.memory_limit_gib", gib, "needs a GPU: it limits PyTorch's CUDA allocator")
    capacity = cfg.hardware.capacity_bytes
    if capacity and gib * (1 << 30) > capacity:
        raise ConfigError("train.memory_limit_gib", gib, f"at most the {capacity / (1 << 30):.1f} GiB of this GPU")


def _data(cfg: RunConfig) -> None:
    d = cfg.data
    if cfg.engine.kind == "hf_trainer":
        return  # its data are the Trainer's own
    if d.tokenizer_vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            "data.tokenizer_vocab_size", d.tokenizer_vocab_size, f"at most model.vocab_size={cfg.model.vocab_size}"
        )
    if d.tokenizer_vocab_size < 257:
        raise ConfigError(
            "data.tokenizer_vocab_size", d.tokenizer_vocab_size, "at least 257: 256 bytes and the end-of-text token"
        )
    if d.kind == "text":
        if not d.path:
            raise ConfigError("data.path", d.path, "a glob of text files, needed with data=text")
        if not any(os.path.isfile(p) for p in glob.iglob(d.path, recursive=True)):
            raise ConfigError("data.path", d.path, "matches no file")
    if d.kind == "hf":
        if not d.path:
            raise ConfigError("data.path", d.path, "a dataset id or folder, needed with data=hf")
        if find_spec("datasets") is None:
            raise ConfigError("data", "hf", 'needs the datasets library: pip install -e ".[hf]"')


def _measure(cfg: RunConfig) -> None:
    if cfg.measure.level == "snapshot" and cfg.hardware.device_type == "cpu":
        raise ConfigError("measure", "snapshot", "needs a GPU's caching allocator; on a CPU use measure=ledger")


def _precision(cfg: RunConfig) -> None:
    if cfg.precision.kind is Precision.FP16_MIXED and cfg.hardware.device_type == "cpu":
        raise ConfigError("precision", "fp16_mixed", "needs a GPU; on a CPU use bf16_mixed or fp32")


def _attention(cfg: RunConfig) -> None:
    backend, cpu = cfg.attention.backend, cfg.hardware.device_type == "cpu"
    half = cfg.precision.kind is not Precision.FP32
    if cpu and backend in (AttentionBackend.MEM_EFFICIENT, AttentionBackend.CUDNN):
        raise ConfigError("attention", backend.value, "needs a GPU; on a CPU use auto, flash, math or eager")
    if not cpu and backend in (AttentionBackend.FLASH, AttentionBackend.CUDNN):
        _half_precision_attention(cfg)
    if not cpu and backend is AttentionBackend.MEM_EFFICIENT:
        multiple = 8 if half and not upcast_beside_quantized(cfg) else 4  # of 16 bytes
        if cfg.model.head_dim % multiple:
            expected = f"needs model.head_dim to be a multiple of {multiple}, not {cfg.model.head_dim}"
            raise ConfigError("attention", backend.value, expected)
    if cpu and backend is AttentionBackend.FLASH and cfg.model.dropout:
        raise ConfigError(
            "attention",
            "flash",
            f"the CPU kernel has no dropout: model.dropout={cfg.model.dropout} needs attention=math or eager",
        )


def _half_precision_attention(cfg: RunConfig) -> None:
    """What flash and cuDNN ask for on a GPU (sdp_utils.cpp). Flash is given heads padded to 8 elements."""
    backend, head_dim = cfg.attention.backend, cfg.model.head_dim
    if cfg.precision.kind is Precision.FP32:
        raise ConfigError(
            "attention", backend.value, "needs bf16 or fp16: set precision=bf16_mixed, or attention=mem_efficient"
        )
    if upcast_beside_quantized(cfg):
        raise ConfigError(
            "attention",
            backend.value,
            "needs bf16 or fp16, and beside a quantized base peft makes what is not quantized fp32: set "
            "precision=bf16_mixed, adapter.prepare_kbit=false, or attention=mem_efficient",
        )
    if backend is AttentionBackend.FLASH and head_dim > 256:
        raise ConfigError("attention", backend.value, f"needs model.head_dim up to 256, not {head_dim}")
    if backend is AttentionBackend.CUDNN and (head_dim > 256 or head_dim % 8):
        raise ConfigError(
            "attention", backend.value, f"needs model.head_dim up to 256 and a multiple of 8, not {head_dim}"
        )


def _loss_and_optimizer(cfg: RunConfig) -> None:
    tokens = cfg.train.micro_batch_size * cfg.train.seq_len
    if cfg.loss.kind == "chunked" and cfg.loss.num_chunks > tokens:
        raise ConfigError("loss.num_chunks", cfg.loss.num_chunks, f"at most the {tokens} tokens of a micro-batch")
    if any(not 0.0 <= b < 1.0 for b in cfg.optimizer.betas):
        raise ConfigError("optimizer.betas", list(cfg.optimizer.betas), "two numbers, 0 or more and less than 1")
    kind, implementation = cfg.optimizer.kind, cfg.optimizer.implementation
    if kind == "adafactor" and implementation == "fused":
        raise ConfigError(
            "optimizer.implementation", "fused", "torch.optim.Adafactor has none; use for_loop (its default) or foreach"
        )
    if kind in BITSANDBYTES and implementation != "fused":
        raise ConfigError(
            "optimizer.implementation",
            implementation,
            f"optimizer={kind} is bitsandbytes' one kernel per tensor: leave it at fused",
        )
    if cfg.checkpointing.kind is Checkpointing.EVERY_K and cfg.checkpointing.every_k > cfg.model.num_layers:
        raise ConfigError(
            "checkpointing.every_k", cfg.checkpointing.every_k, f"at most model.num_layers={cfg.model.num_layers}"
        )


def _strategy(cfg: RunConfig) -> None:
    strategy, world = cfg.parallel.strategy, cfg.world_size
    if strategy is Strategy.SINGLE and world != 1:
        raise ConfigError("world_size", world, "parallel=single is one process; use parallel=ddp or start one process")
    if strategy is Strategy.HSDP:
        size = cfg.parallel.fsdp.shard_size
        if world < 2 or (world % 2 and size is None):
            raise ConfigError(
                "world_size", world, "parallel=hsdp needs an even number of ranks, or parallel.fsdp.shard_size"
            )
        if size is not None and (size < 1 or world % size):
            raise ConfigError("parallel.fsdp.shard_size", size, f"must divide world_size={world}")
    elif cfg.parallel.fsdp.shard_size is not None:
        raise ConfigError("parallel.fsdp.shard_size", cfg.parallel.fsdp.shard_size, "only with parallel=hsdp")
    if strategy.is_fsdp and cfg.optimizer.kind == "sgd" and cfg.optimizer.implementation == "fused":
        raise ConfigError(
            "optimizer.implementation", "fused", "PyTorch's fused SGD has no DTensor rule; use foreach with FSDP"
        )
    if strategy.is_fsdp and cfg.optimizer.kind in BITSANDBYTES:
        raise ConfigError(
            "optimizer",
            cfg.optimizer.kind,
            "bitsandbytes' update has no sharding rule for DTensor, FSDP2's parameters; use parallel=zero2 or zero3",
        )
    if strategy.is_fsdp and cfg.optimizer.kind == "adafactor":
        raise ConfigError(
            "optimizer",
            "adafactor",
            "it squares norms in place, which DTensor, FSDP2's parameter, refuses for a partial norm; "
            "use parallel=zero2 or zero3",
        )
    if strategy is Strategy.DDP and cfg.parallel.ddp.static_graph and cfg.train.gradient_accumulation_steps > 1:
        raise ConfigError(
            "parallel.ddp.static_graph",
            True,
            "DDP's static graph asserts when a backward does not reduce: set train.gradient_accumulation_steps=1",
        )
    if strategy.zero_stage and cfg.parallel.zero.allgather_bucket_size % 2:
        raise ConfigError(
            "parallel.zero.allgather_bucket_size",
            cfg.parallel.zero.allgather_bucket_size,
            "must be even: DeepSpeed aligns its all-gather to 2 elements",
        )
    if strategy.zero_stage and cfg.train.compile:
        raise ConfigError("train.compile", True, f"not offered with parallel={strategy.value}; use single, ddp or fsdp")
