"""Rules of quantization and adapters: what bitsandbytes, peft and the strategies refuse, before anything starts."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from lab.config.errors import ConfigError
from lab.config.schema import ModelConfig, RunConfig
from lab.vocab import Precision, Strategy

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes, backends/cuda/ops.py
ADAPTER_WEIGHTS, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def check_finetuning(cfg: RunConfig) -> None:
    """Raise ConfigError for the first rule of quantization or adapters that ``cfg`` breaks."""
    if cfg.quantization.kind != "none":
        _quantization(cfg)
        _quantized_strategy(cfg)
    if cfg.adapter.kind != "none":
        _adapter(cfg)
    elif cfg.adapter.save or cfg.adapter.load is not None:
        raise ConfigError(
            "adapter", "none", "adapter.save and adapter.load need an adapter: adapter=lora or adapter=dora"
        )
    if cfg.adapter.load is not None:
        check_saved_adapter(cfg.adapter.load, cfg.adapter.allow_pickle)


def upcast_beside_quantized(cfg: RunConfig) -> bool:
    """Is all but the quantized base fp32, in bf16_pure too (prepare_model_for_kbit_training)? ZeRO casts it back."""
    prepared = cfg.quantization.kind != "none" and cfg.adapter.prepare_kbit
    return prepared and cfg.precision.kind is Precision.BF16_PURE and not cfg.parallel.strategy.zero_stage


def linear_paths(model: ModelConfig) -> tuple[str, ...]:
    """Names of the Linears (GPT-2's: Conv1D) of the model's blocks; with Hugging Face an untied head's too."""
    parts: tuple[str, ...]
    if model.family == "gpt2":
        parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    else:
        attention = ("qkv_proj",) if model.fused_qkv else ("q_proj", "k_proj", "v_proj")
        mlp = ("gate_proj", "up_proj", "down_proj") if model.mlp == "swiglu" else ("up_proj", "down_proj")
        within = "attention" if model.family == "lab" else "self_attn"
        parts = (*(f"{within}.{leaf}" for leaf in (*attention, "o_proj")), *(f"mlp.{leaf}" for leaf in mlp))
    blocks = {"lab": "blocks", "gpt2": "hf.transformer.h"}.get(model.family, "hf.model.layers")
    head = () if model.family == "lab" or model.tied_head else ("hf.lm_head",)
    return (*(f"{blocks}.{i}.{part}" for i in range(model.num_layers) for part in parts), *head)


def _quantization(cfg: RunConfig) -> None:
    q, precision = cfg.quantization, cfg.precision.kind
    if cfg.adapter.kind == "none":
        raise ConfigError(
            "quantization", q.kind, "packed weights cannot be trained: set adapter=lora (or dora), or quantization=none"
        )
    if cfg.adapter.kind == "dora":
        raise ConfigError(
            "adapter",
            "dora",
            f"needs its base's row norms, which quantization={q.kind} changes after they are drawn; "
            "use adapter=lora, or quantization=none",
        )
    if cfg.model.family == "gpt2":
        raise ConfigError(
            "quantization", q.kind, "GPT-2's layers in transformers are Conv1D, not Linears: nothing to pack"
        )
    if q.kind != "int8" and q.block_size not in BLOCK_SIZES:
        raise ConfigError("quantization.block_size", q.block_size, f"one of {', '.join(map(str, BLOCK_SIZES))}")
    head = "head" if cfg.model.family == "lab" else "hf.lm_head"
    if cfg.model.tied_head and cfg.model.family != "other" and not _names(head, q.skip_modules):
        raise ConfigError(
            "quantization.skip_modules",
            list(q.skip_modules),
            f"a tied head is the embedding's weight, which stays as it is: name {head.rpartition('.')[2]} too",
        )
    half = {Precision.BF16_MIXED: "bf16", Precision.FP16_MIXED: "fp16"}.get(precision)
    if q.kind != "int8" and half is not None and q.compute_dtype != half:
        raise ConfigError(
            "quantization.compute_dtype",
            q.compute_dtype,
            f"precision={precision.value} multiplies in {half}: set {half}",
        )
    if cfg.train.compile:
        raise ConfigError("train.compile", True, "not with quantized layers, whose products PyTorch cannot trace")


def odd_int8_outputs(cfg: RunConfig) -> dict[str, int]:
    """int8 Linears by the last part of their name, with their outputs, where those are no multiple of 4.

    cuBLASLt's int8 product refuses some of these shapes; bitsandbytes goes around it for odd *inputs* alone.
    """
    m, found = cfg.model, dict[str, int]()
    if cfg.quantization.kind != "int8" or cfg.hardware.device_type != "cuda" or m.family == "other":
        return found
    q, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    sizes = {  # (in, out)
        "qkv_proj": (m.hidden_size, q + 2 * kv),
        "q_proj": (m.hidden_size, q),
        "o_proj": (q, m.hidden_size),
        **dict.fromkeys(("k_proj", "v_proj"), (m.hidden_size, kv)),
        **dict.fromkeys(("gate_proj", "up_proj"), (m.hidden_size, m.intermediate_size)),
        "down_proj": (m.intermediate_size, m.hidden_size),
        "lm_head": (m.hidden_size, m.vocab_size),
    }
    for name in linear_paths(m):
        leaf = name.rpartition(".")[2]
        width, rows = sizes[leaf]
        if width % 4 == 0 and rows % 4 and not _names(name, cfg.quantization.skip_modules):
            found[leaf] = rows
    return found


def _names(module: str, wanted: tuple[str, ...]) -> bool:
    """Is the module one of ``wanted``: names or last parts of names?"""
    return any(module == w or module.endswith("." + w) for w in wanted)


def _quantized_strategy(cfg: RunConfig) -> None:
    q, strategy = cfg.quantization, cfg.parallel.strategy
    if strategy is Strategy.ZERO3:
        raise ConfigError(
            "parallel",
            "zero3",
            "bitsandbytes keeps a gathered packed weight in its autograd context until the backward is over, so ZeRO-3 "
            "shards nothing of a quantized base; use parallel=fsdp or zero2",
        )
    if strategy.is_fsdp and q.kind == "int8":
        raise ConfigError(
            "quantization",
            "int8",
            "FSDP2 makes plain parameters of what it cuts, and bitsandbytes' Int8Params loses its "
            "scales then; use quantization=nf4, or parallel=ddp or zero2",
        )
    # What is stored in a float type is cast by whoever casts the model: the packed bytes must not be.
    casts = {Precision.BF16_MIXED: "bf16", Precision.FP16_MIXED: "fp16"}
    if strategy.zero_stage:
        casts |= {Precision.BF16_PURE: "bf16", Precision.FP32: "fp32"}
    target = casts.get(cfg.precision.kind) if strategy.is_fsdp or strategy.zero_stage else None
    if q.kind != "int8" and target is not None and q.storage_dtype not in ("uint8", target):
        raise ConfigError(
            "quantization.storage_dtype",
            q.storage_dtype,
            f"parallel={strategy.value} casts all floating-point parameters to {target}: set {target} or uint8",
        )


def _adapter(cfg: RunConfig) -> None:
    a = cfg.adapter
    if not 0.0 <= a.dropout < 1.0:
        raise ConfigError("adapter.dropout", a.dropout, "a probability, 0 or more and less than 1")
    if not a.target_modules:
        raise ConfigError("adapter.target_modules", [], "names of Linears, or all-linear")
    if cfg.model.family != "other":  # of those only transformers knows the names
        known = linear_paths(cfg.model)
        for target in a.target_modules:
            if target != "all-linear" and not any(_names(n, (target,)) for n in known):
                leaves = dict.fromkeys(n.rpartition(".")[2] for n in known)
                raise ConfigError(
                    "adapter.target_modules", list(a.target_modules), f"{target} matches no Linear: {', '.join(leaves)}"
                )
    if a.kind == "dora" and cfg.parallel.strategy not in (Strategy.SINGLE, Strategy.DDP):
        raise ConfigError(
            "adapter",
            "dora",
            f"peft reads whole base weights for their norms, which parallel={cfg.parallel.strategy.value} "
            "cuts; use adapter=lora, or parallel=single or ddp",
        )
    mixed = cfg.precision.kind is Precision.BF16_PURE and a.train_embeddings
    if mixed and cfg.parallel.strategy.is_fsdp and not (a.prepare_kbit and cfg.quantization.kind != "none"):
        raise ConfigError(
            "adapter.train_embeddings",
            True,
            "FSDP2 wants one type of trained parameters, and precision=bf16_pure keeps "
            "the embedding in bf16 beside fp32 adapters; use precision=bf16_mixed",
        )


def check_saved_adapter(load: str, allow_pickle: bool) -> None:
    """ConfigError: no adapter in the folder, a pickle that nobody asked for, or a file that is cut short."""
    safe, pickled = Path(load) / ADAPTER_WEIGHTS, Path(load) / ADAPTER_PICKLE
    if safe.is_file():
        _check_safetensors(load, safe)
    elif not pickled.is_file():
        raise ConfigError("adapter.load", load, f"a folder with {ADAPTER_WEIGHTS}, as adapter.save=true writes it")
    elif not allow_pickle:
        raise ConfigError(
            "adapter.load",
            load,
            f"holds {ADAPTER_PICKLE} only, a pickle, which may run code: adapter.allow_pickle=true reads it",
        )


def _check_safetensors(load: str, path: Path) -> None:
    """The header is JSON and the tensors it lists fill the file (8 bytes of length, the header, the data)."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        if path.stat().st_size != 8 + length + end:
            raise ValueError(f"{path.stat().st_size} B, not {8 + length + end}")
    except (ValueError, KeyError, TypeError, struct.error, OSError) as error:
        raise ConfigError("adapter.load", load, f"{ADAPTER_WEIGHTS} is corrupt: {error}") from None
