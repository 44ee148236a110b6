"""build(cfg, device) -> Engine, in one fixed order.

Meta model, quantized layers, adapters, checkpointing; then shard and materialise (which quantizes), optimizer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from lab.config import RunConfig
from lab.model import Decoder
from lab.model.hf import build_hf_model
from lab.parallel import Engine, build_engine
from lab.transforms.adapters import apply_adapter
from lab.transforms.checkpointing import apply_checkpointing
from lab.transforms.precision import apply_tf32, parameter_dtype
from lab.transforms.quantization import cast_unquantized, quantize_linears


def build_meta_model(cfg: RunConfig) -> nn.Module:
    """The model on the meta device in its parameter dtype: no memory, no values."""
    if cfg.model.family != "lab":
        return build_hf_model(cfg, parameter_dtype(cfg))  # with transformers' own checkpointing
    with torch.device("meta"):
        model = Decoder(cfg.model, cfg.attention, cfg.loss)
    model.to(parameter_dtype(cfg))
    return model


def build(cfg: RunConfig, device: torch.device) -> Engine:
    """Everything that lives on ``device`` before the first step. Needs the process group where one is used."""
    apply_tf32(cfg, device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(cfg.seed + rank)  # dropout masks differ over ranks; the weights have seeds of their own
    model = build_meta_model(cfg)
    quantize_linears(model, cfg.quantization)
    apply_adapter(model, cfg.adapter, getattr(model, "token_embedding", "embedding"))
    if cfg.parallel.strategy.zero_stage:  # DeepSpeed casts adapters too: not after they were drawn in fp32
        cast_unquantized(model, parameter_dtype(cfg))
    if cfg.model.family == "lab":
        apply_checkpointing(model.get_submodule("blocks"), cfg)
    return build_engine(cfg, model, device)
