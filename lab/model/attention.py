"""Scaled dot-product attention by backend: PyTorch's SDPA kernels, or written out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.vocab import AttentionBackend

_SDPA: dict[AttentionBackend, SDPBackend] = {
    AttentionBackend.MATH: SDPBackend.MATH,
    AttentionBackend.MEM_EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    AttentionBackend.FLASH: SDPBackend.FLASH_ATTENTION,
    AttentionBackend.CUDNN: SDPBackend.CUDNN_ATTENTION,
}


def repeat_kv(x: Tensor, repeats: int) -> Tensor:
    """[b, k, s, d] -> [b, k * repeats, s, d], copied; x itself when repeats is 1."""
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention written out; keeps the [b, n, s, s] weights for backward."""
    repeats = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, repeats), repeat_kv(v, repeats)
    weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[-1]))
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    weights = weights.masked_fill(~causal, float("-inf"))
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ v


def attention(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend, dropout: float) -> Tensor:
    """q [b, n, s, d], k and v [b, k, s, d] -> [b, n, s, d], causal.

    Grouped key/value heads go to the kernel as they are (``enable_gqa``), except for the
    memory-efficient kernel, which needs them repeated. A kernel that the hardware, dtype or shape
    refuses raises RuntimeError: there is no silent fallback.
    """
    if backend is AttentionBackend.EAGER:
        return eager_attention(q, k, v, dropout)
    grouped = q.shape[1] != k.shape[1]
    if grouped and backend is AttentionBackend.MEM_EFFICIENT:
        repeats = q.shape[1] // k.shape[1]
        k, v, grouped = repeat_kv(k, repeats), repeat_kv(v, repeats), False
    if backend is AttentionBackend.AUTO:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
    with sdpa_kernel(_SDPA[backend]):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
