"""Next-token cross entropy: at once, with its gradient made in place, or in chunks that are never all alive."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lab.config import LossConfig


def _summed_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """x [tokens, h], targets [tokens] -> summed fp32 cross entropy of head(x)."""
    logits = head(x)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def _cross_entropy_without_upcast(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits [tokens, v] with the log-softmax and its gradient in the logits' own dtype.

    The softmax kernels add up in fp32 inside; what they write is rounded. The mean over tokens is fp32.
    Autocast is off so that nothing is widened behind our back: it casts nll_loss's input, for one.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_softmax = F.log_softmax(logits, dim=-1)
        picked = log_softmax.gather(1, targets.unsqueeze(1))
        return -picked.float().mean()


class InPlaceCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of logits [tokens, v]; backward turns the kept log-softmax into the logits' gradient.

    F.cross_entropy's backward makes two further fp32 [tokens, v] matrices, the log-softmax's gradient (almost all
    zeros) and the logits'. The gradient is (softmax - onehot) / tokens, so one exponential in place and one
    product into the logits' type do it. One backward per forward: the kept tensor is overwritten.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_softmax = F.log_softmax(logits.float(), dim=-1)
        ctx.save_for_backward(log_softmax, targets)
        ctx.logits_dtype = logits.dtype
        return F.nll_loss(log_softmax, targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        probabilities, targets = ctx.saved_tensors
        probabilities.exp_()
        minus_one = torch.full((targets.numel(), 1), -1.0, device=targets.device)
        probabilities.scatter_add_(1, targets.unsqueeze(1), minus_one)
        scale = grads[0] / targets.numel()
        if ctx.logits_dtype == probabilities.dtype:
            return probabilities.mul_(scale), None
        out = torch.empty(probabilities.shape, dtype=ctx.logits_dtype, device=probabilities.device)
        return torch.mul(probabilities, scale, out=out), None


def language_model_loss(head: nn.Module, x: Tensor, targets: Tensor, cfg: LossConfig) -> Tensor:
    """Mean cross entropy of head(x) [b, s, v] against targets [b, s], an fp32 scalar.

    ``no_upcast`` leaves the log-softmax in the logits' dtype, the others compute it in fp32. ``in_place`` needs two
    fp32 [b * s, v] matrices less in backward. ``chunked`` splits the b * s tokens into ``num_chunks`` parts, each
    under activation checkpointing, so that one part's logits exist at a time in forward and in backward.
    """
    tokens = targets.numel()
    x, targets = x.reshape(tokens, -1), targets.reshape(tokens)
    if cfg.kind == "cross_entropy":
        logits = head(x)
        logits = logits.float()  # drops the half-precision logits before the softmax is made
        return F.cross_entropy(logits, targets)
    if cfg.kind == "no_upcast":
        return _cross_entropy_without_upcast(head(x), targets)
    if cfg.kind == "in_place":
        loss: Tensor = InPlaceCrossEntropy.apply(head(x), targets)
        return loss
    total = x.new_zeros((), dtype=torch.float32)
    for x_chunk, target_chunk in zip(x.chunk(cfg.num_chunks), targets.chunk(cfg.num_chunks), strict=True):
        total = total + checkpoint(
            _summed_cross_entropy, head, x_chunk, target_chunk, use_reentrant=False, preserve_rng_state=False
        )
    return total / tokens
