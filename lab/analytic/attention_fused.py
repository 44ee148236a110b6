"""Attention by one kernel: flash, cuDNN, memory-efficient. None keeps a square of the sequence length.

Sizes of kernels' scratch memory, each seen to the byte in an H200's allocator trace (torch 2.11):
flash: csrc/flash_attn/flash_api.cpp, mha_bwd; memory-efficient: cuda/mem_eff_attention/kernel_backward.h
and attention_backward.cu; cuDNN: MHA.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from lab.analytic.attention_shape import AttentionShape, pads_heads
from lab.analytic.attention_workspace import accumulates_outside, workspace_bytes
from lab.analytic.ops import Ops
from lab.analytic.tape import FP32, Grads, Tensor
from lab.vocab import AttentionBackend


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def fused(
    ops: Ops,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: AttentionShape,
    backend: AttentionBackend,
    dropout: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Flash, cuDNN, memory-efficient (and the CPU's flash): keeps q, k, v, the output and log-sum-exp per row.

    ``bias``: an additive mask, kept as well; flash takes none.
    """
    if not pads_heads(backend, a, ops.tape.trace.on_device_kernels):
        return _kernel(ops, q, k, v, a, backend, dropout, bias)
    tape, cut, size = ops.tape, a.q_numel, q.itemsize
    wide = replace(a, d=_round_up(a.d, 8))
    q = _padded(ops, q, wide.q_numel, "query")
    k = _padded(ops, k, wide.kv_numel, "key")
    v = _padded(ops, v, wide.kv_numel, "value")
    y = _kernel(ops, q, k, v, wide, backend, dropout, None, heads_first=True)
    return y.view(cut, tape.node([y], lambda _: [tape.new(wide.q_numel, size, "attention output gradient, padded")]))


def _padded(ops: Ops, x: Tensor, numel: int, label: str) -> Tensor:
    """pad_last_dim<8>: a copy whose heads lie one after another. Backward: a clone of the gradient's first part."""
    cut, size, tape = x.numel, x.itemsize, ops.tape
    node = tape.node([x], lambda _: [tape.new(cut, size, label + " gradient")])
    y = ops.new(numel, size, label + ", padded")
    y.node = node
    return y


def _kernel(
    ops: Ops,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: AttentionShape,
    backend: AttentionBackend,
    dropout: float,
    bias: Tensor | None,
    heads_first: bool = False,
) -> Tensor:
    """``heads_first``: q, k and v are [b, n, s, d] in memory, not [b, s, n, d] as projections are."""
    size, tape, gpu = q.itemsize, ops.tape, ops.tape.trace.on_device_kernels
    rows = a.b * a.n * a.s
    seeds = {AttentionBackend.FLASH: 2, AttentionBackend.CUDNN: 2}.get(backend, 0) if gpu else 0
    grouped = a.n != a.k

    turned = heads_first and a.n > 1 and a.s > 1

    def backward(grads: Grads) -> Grads:
        # _flash_attention_backward takes the output and its gradient as [b, s, n, d]
        labels = ("attention output gradient, contiguous", "attention output, contiguous") if turned else ()
        rows_first = [tape.new(a.q_numel, size, label) for label in labels]
        gq = tape.new(a.q_numel, size, "query gradient")
        gk = tape.new(a.kv_numel, size, "key gradient")
        gv = tape.new(a.kv_numel, size, "value gradient")
        if not gpu:
            return [gq, gk, gv]
        if backend is AttentionBackend.MEM_EFFICIENT:
            delta_rows = a.b * a.n * _round_up(a.s, 32)
            if size == FP32:  # (grad * out).sum(-1).transpose().contiguous(); half kernels compute it themselves
                product = tape.new(a.q_numel, FP32, "gradient times output")
                summed = tape.new(rows, FP32, "attention backward row sums")
                delta = tape.new(delta_rows, FP32, "attention backward row sums")
                del summed, product
            else:
                delta = tape.new(delta_rows, FP32, "attention backward row sums")
            ops.scratch(workspace_bytes(a, size), "attention backward workspace")
            del delta
            return [gq, gk, gv]
        expanded = 2 * size * a.q_numel if grouped else 0  # dk and dv per query head, before they are summed
        if backend is AttentionBackend.CUDNN:  # one workspace, whose parts end with one of 256 B
            ops.scratch(expanded + FP32 * (a.q_numel + rows) + 256, "cuDNN attention workspace")
            return [gq, gk, gv]
        tall = _round_up(a.s, 128)
        sums = tape.new(a.b * a.n * tall, FP32, "attention backward row sums")
        accumulator = tape.new(a.b * a.n * tall * _wide(a.d), FP32, "fp32 query gradient accumulator")
        both = [tape.new(a.q_numel, size, "expanded key/value gradient") for _ in range(2 if grouped else 0)]
        del both, accumulator, sums  # C++ locals go last first
        while rows_first:
            rows_first.pop()
        return [gq, gk, gv]

    node = tape.node([q, k, v], backward, [bias, k, q, v])  # declared by name: attn_bias, key, query, value
    cudnn, random_state = backend is AttentionBackend.CUDNN, []
    if cudnn:  # made before the graph runs; flash makes them while it does
        random_state = [ops.kept_or(1, 8, "attention random state") for _ in range(seeds)]
    out = ops.kept_or(a.q_numel, size, "attention output")
    lse_rows = a.b * a.n * (_round_up(a.s, 32) if backend is AttentionBackend.MEM_EFFICIENT else a.s)
    lse = ops.kept_or(lse_rows, FP32, "log-sum-exp")
    if backend is AttentionBackend.MEM_EFFICIENT and accumulates_outside(a, size) and not ops.taken_back:
        ops.scratch(a.q_numel * FP32, "fp32 attention output accumulator")
    if cudnn:
        ops.scratch(256, "cuDNN workspace")
    else:
        splits = flash_splits(a, ops.num_streaming_multiprocessors) if seeds and not dropout else 1
        parts = [tape.new(splits * rows * width, FP32, "attention splits") for width in (1, _wide(a.d)) if splits > 1]
        random_state = [ops.kept_or(1, 8, "attention random state") for _ in range(seeds)]
        while parts:
            parts.pop(0)
    tape.save(node, lse)
    tape.save(node, out)
    del lse
    while random_state:
        tape.save(node, random_state.pop(0))
    out.node = node
    return out


def _wide(d: int) -> int:
    """Flash's head_size_rounded."""
    return _round_up(d, 32) if d <= 128 else _round_up(d, 64)


def flash_splits(a: AttentionShape, num_sms: int) -> int:
    """Into how many parts flash's forward cuts the keys, where rows alone would leave multiprocessors idle; 1: none.

    Each part has an fp32 output and log-sum-exp of its own, summed at the end. With dropout it never does.
    Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, set_params_splitkv, num_splits_heuristic.
    """
    row_blocks, slots = a.b * a.n * -(-a.s // 64), 2 * num_sms
    key_blocks = -(-a.s // (256 if a.d <= 64 else 128 if a.d <= 128 else 64))
    if row_blocks >= 0.8 * slots:
        return 1
    eligible = [
        n
        for n in range(1, min(128, slots, key_blocks) + 1)
        if n == 1 or -(-key_blocks // n) != -(-key_blocks // (n - 1))
    ]
    efficiency = {n: row_blocks * n / slots / -(-row_blocks * n // slots) for n in eligible}
    best = max(efficiency.values(), default=0.0)
    return next((n for n in eligible if efficiency[n] >= 0.85 * best), 1)
