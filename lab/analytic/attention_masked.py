"""Attention that is given a mask (sliding windows) instead of being told that it is causal.

Source: transformers integrations/sdpa_attention.py (5.17 and 5.24); aten/src/ATen/native/transformers/attention.cpp.
cuDNN's workspaces are taken to be those without a mask; no run has shown them (configs/experiment/sliding.yaml).
"""

from __future__ import annotations

from dataclasses import replace

from lab.analytic.attention import contiguous
from lab.analytic.attention_fused import fused
from lab.analytic.attention_shape import AttentionShape
from lab.analytic.attention_written_out import expanded_kv, math, repeat_kv
from lab.analytic.ops import Ops
from lab.analytic.tape import Tensor
from lab.vocab import AttentionBackend

BIAS_ALIGNMENT = 16  # elements; preprocess_mask, mem_eff_alignment (torch 2.11)


def masked_attention(
    ops: Ops, q: Tensor, k: Tensor, v: Tensor, a: AttentionShape, backend: AttentionBackend, dropout: float
) -> Tensor:
    """sdpa_attention_forward with a bool mask, which its caller holds: q [b, n, s, d], k and v [b, k, s, d] -> q's.

    use_gqa_in_sdpa: with a mask, transformers repeats the key and value heads itself, before autocast casts them; the
    repeated ones are local variables there.
    """
    repeated = a.n != a.k
    if repeated:
        repeat = expanded_kv if a.k == 1 else repeat_kv
        k, v = repeat(ops, k, a, "key"), repeat(ops, v, a, "value")
    y = _kernel(ops, q, k, v, replace(a, k=a.n), backend, dropout, repeated)
    y = contiguous(ops, y, a, backend)
    del k, v
    return y


def _kernel(
    ops: Ops,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: AttentionShape,
    backend: AttentionBackend,
    dropout: float,
    repeated: bool,
) -> Tensor:
    """F.scaled_dot_product_attention: the mask as numbers to be added, in the query's type, made anew by each call."""
    if ops.amp is not None:
        v, k, q = (  # the arguments of a C++ call, from the last to the first
            ops.cast(t, ops.amp, f"{name}, autocast copy") for t, name in ((v, "value"), (k, "key"), (q, "query"))
        )
    bias = _as_bias(ops, a, q.itemsize, aligned=backend is AttentionBackend.MEM_EFFICIENT)
    if backend is AttentionBackend.MATH:
        return math(ops, q, k, v, a, dropout, bias=bias, in_order=repeated)
    return fused(ops, q, k, v, a, backend, dropout, bias=bias)


def _as_bias(ops: Ops, a: AttentionShape, size: int, aligned: bool) -> Tensor:
    """convert_boolean_attn_mask: at::where of two scalars; for the memory-efficient kernel then preprocess_mask.

    That one pads rows that are no multiple of 16 elements, by a copy; what it returns is a part of the copy.
    """
    gpu = ops.tape.trace.on_device_kernels
    chosen = [ops.new(1, size, "mask values") for _ in range(2 if gpu else 0)]
    bias = ops.new(a.b * a.s * a.s, size, "additive causal mask")
    del chosen
    padded = -(-a.s // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    if aligned and padded != a.s:
        bias = ops.new(a.b * a.s * padded, size, "additive causal mask, padded")
    return bias
