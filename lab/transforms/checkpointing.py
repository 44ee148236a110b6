"""Activation checkpointing of blocks: all, every k-th, or selective (matmul and attention outputs kept).

A block's ``forward`` is wrapped in place. Parameter names do not change and the block stays the unit
that FSDP shards and gathers; the checkpoint lies inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lab.config import RunConfig
from lab.vocab import Checkpointing

_aten = torch.ops.aten

# Saved under `selective`: what is expensive to compute again. F.linear reaches the policy as mm
# (no bias) or addmm (bias); `linear` itself where a backend keeps it whole.
SAVED_OPS: frozenset[Any] = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.linear.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def checkpointed_layers(cfg: RunConfig) -> list[int]:
    """Indices of the blocks whose forward runs again in backward."""
    layers = range(cfg.model.num_layers)
    match cfg.checkpointing.kind:
        case Checkpointing.NONE:
            return []
        case Checkpointing.EVERY_K:
            return [i for i in layers if i % cfg.checkpointing.every_k == 0]
        case Checkpointing.FULL | Checkpointing.SELECTIVE:
            return list(layers)


def _selective_policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_selective_policy)


def _wrap(forward: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    def checkpointed_forward(*args: Tensor | None) -> Tensor:
        out: Tensor = checkpoint(forward, *args, use_reentrant=False, **options)
        return out

    return checkpointed_forward


def apply_checkpointing(blocks: nn.ModuleList, cfg: RunConfig) -> None:
    """Wrap the forward of the configured blocks with non-reentrant ``torch.utils.checkpoint``.

    The random state is kept (a copy per block on the host) only with dropout, of the model or of its adapters, where
    the second forward has to draw the same masks.
    """
    dropout = cfg.model.dropout > 0.0 or (cfg.adapter.kind != "none" and cfg.adapter.dropout > 0.0)
    options: dict[str, Any] = {"preserve_rng_state": dropout}
    if cfg.checkpointing.kind is Checkpointing.SELECTIVE:
        options["context_fn"] = _selective_contexts
    for index in checkpointed_layers(cfg):
        block = blocks[index]
        block.forward = _wrap(block.forward, options)
