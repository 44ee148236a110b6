"""Next-token cross entropy: at once, or in chunks of tokens whose logits are never all alive."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lab.config import LossConfig


def _summed_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """x [tokens, h], targets [tokens] -> summed fp32 cross entropy of head(x)."""
    logits = head(x)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def language_model_loss(head: nn.Module, x: Tensor, targets: Tensor, cfg: LossConfig) -> Tensor:
    """Mean cross entropy in fp32 of head(x) [b, s, v] against targets [b, s].

    ``chunked`` splits the b * s tokens into ``num_chunks`` parts, each under activation
    checkpointing, so that one part's logits exist at a time in forward and in backward.
    """
    tokens = targets.numel()
    x, targets = x.reshape(tokens, -1), targets.reshape(tokens)
    if cfg.kind == "cross_entropy":
        logits = head(x)
        logits = logits.float()  # drops the half-precision logits before the softmax is made
        return F.cross_entropy(logits, targets)
    total = x.new_zeros((), dtype=torch.float32)
    for x_chunk, target_chunk in zip(x.chunk(cfg.num_chunks), targets.chunk(cfg.num_chunks), strict=True):
        total = total + checkpoint(
            _summed_cross_entropy, head, x_chunk, target_chunk, use_reentrant=False, preserve_rng_state=False
        )
    return total / tokens
