"""What one setting may be by itself: one of a few words, positive, not absurd. Each violation is one ConfigError."""

from __future__ import annotations

import re

from lab.config.errors import ConfigError
from lab.config.schema import RunConfig

_CHOICES: dict[str, tuple[str, ...]] = {
    "model.norm": ("rmsnorm", "layernorm"),
    "model.mlp": ("swiglu", "gelu"),
    "model.position": ("rope", "learned"),
    "data.kind": ("python_stdlib", "text", "hf"),
    "parallel.fsdp.reduce_dtype": ("fp32", "param"),
    "loss.kind": ("cross_entropy", "no_upcast", "in_place", "chunked"),
    "quantization.kind": ("none", "int8", "fp4", "nf4", "nf4_double"),
    "quantization.compute_dtype": ("bf16", "fp16", "fp32"),
    "quantization.storage_dtype": ("uint8", "bf16", "fp16", "fp32"),
    "adapter.kind": ("none", "lora", "dora"),
    "optimizer.kind": (
        "adamw",
        "sgd",
        "adafactor",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
    ),
    "optimizer.implementation": ("foreach", "fused", "for_loop"),
    "engine.kind": ("native", "accelerate", "hf_trainer"),
    "measure.level": ("off", "counters", "ledger", "snapshot"),
    "tracker.kind": ("wandb", "none"),
    "tracker.mode": ("auto", "offline", "online"),
    "hardware.device_type": ("cpu", "cuda"),
}

BITSANDBYTES_ELEMENTS = (1 << 31) - 1  # backends/cuda/ops.py hands a tensor's size over as c_int32, which wraps unseen

_POSITIVE = [
    "world_size",
    "engine.batch_tensors",
    "model.num_layers",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.vocab_size",
    "model.max_seq_len",
    "train.micro_batch_size",
    "train.seq_len",
    "train.gradient_accumulation_steps",
    "train.steps",
    "data.tokenizer_vocab_size",
    "data.max_bytes",
    "checkpointing.every_k",
    "loss.num_chunks",
    "launch.timeout_s",
    "parallel.ddp.bucket_cap_mb",
    "parallel.zero.reduce_bucket_size",
    "parallel.zero.allgather_bucket_size",
    "parallel.zero.sub_group_size",
    "model.rope_theta",
    "model.norm_eps",
    "optimizer.eps",
    "quantization.block_size",
    "adapter.rank",
    "adapter.alpha",
]

# No tensor, batch or table of these many entries exists; a larger one is a slip of the keyboard.
_AT_MOST_INT32 = [
    *(p for p in _POSITIVE if p.startswith("model.") and p not in ("model.rope_theta", "model.norm_eps")),
    "train.micro_batch_size",
    "train.seq_len",
    "train.gradient_accumulation_steps",
    "train.steps",
    "world_size",
]

# The option's name says the kind; the other settings of the group come with the option.
_CHOSEN_BY_GROUP = {
    "parallel": "strategy",
    "precision": "kind",
    "checkpointing": "kind",
    "attention": "backend",
    "loss": "kind",
    "optimizer": "kind",
    "engine": "kind",
    "measure": "level",
    "quantization": "kind",
    "adapter": "kind",
}

_NOT_NEGATIVE = [
    "train.warmup_steps",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.momentum",
    "optimizer.min_8bit_size",
    "parallel.zero.stage3_prefetch_bucket_size",
    "parallel.zero.stage3_param_persistence_threshold",
    "parallel.zero.stage3_max_live_parameters",
    "parallel.zero.stage3_max_reuse_distance",
    "seed",
]


def _get(cfg: RunConfig, path: str) -> object:
    value: object = cfg
    for part in path.split("."):
        value = getattr(value, part)
    return value


def check_limits(cfg: RunConfig) -> None:
    """Raise ConfigError for the first setting of ``cfg`` that is out of its range."""
    for path, options in _CHOICES.items():
        if (value := _get(cfg, path)) not in options:
            raise ConfigError(path, value, f"expected one of {', '.join(options)}")
    for path in _POSITIVE:
        value = _get(cfg, path)
        if not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(path, value, "must be positive")
    for path in _NOT_NEGATIVE:
        value = _get(cfg, path)
        if not isinstance(value, (int, float)) or not value >= 0:
            raise ConfigError(path, value, "must not be negative")
    for path in _AT_MOST_INT32:
        value = _get(cfg, path)
        if isinstance(value, int) and value >= 1 << 31:
            raise ConfigError(path, value, f"at most {(1 << 31) - 1}")
    if cfg.seed >= 1 << 63:
        raise ConfigError("seed", cfg.seed, "at most 2^63 - 1: it seeds a 64-bit generator")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", cfg.name):
        raise ConfigError(
            "name",
            cfg.name,
            "it names a folder: up to 200 letters, digits, '.', '_' and '-', not starting with '.' or '-'",
        )
    for group, field in _CHOSEN_BY_GROUP.items():
        value, chosen = _get(cfg, f"{group}.{field}"), cfg.choices.get(group)
        if chosen and value != chosen:
            raise ConfigError(f"{group}.{field}", value, f"contradicts {group}={chosen}; write {group}={value}")


def check_elements(optimizer: str, largest: int) -> None:
    """ConfigError where a tensor of ``largest`` elements (a ZeRO partition may be) is too much for bitsandbytes."""
    if largest > BITSANDBYTES_ELEMENTS:
        raise ConfigError(
            "optimizer",
            optimizer,
            f"bitsandbytes counts a tensor's elements in 32 bits and a rank's flat partition has {largest}; "
            "use optimizer=adamw, more ranks, or parallel=zero3 with parallel.zero.sub_group_size below 2^31",
        )
