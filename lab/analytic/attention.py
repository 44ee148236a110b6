"""What attention allocates and keeps, by backend. Shapes as in ``lab.model.attention``.

Sizes of kernels' scratch memory, each seen to the byte in an H200's allocator trace (torch 2.11):
flash: csrc/flash_attn/flash_api.cpp, mha_bwd; memory-efficient: cuda/mem_eff_attention/kernel_backward.h
and attention_backward.cu; cuDNN: MHA.cpp; math: transformers/attention.cpp, _scaled_dot_product_attention_math.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.analytic.ops import Ops
from lab.analytic.tape import BOOL, FP32, Grads, Tensor
from lab.vocab import AttentionBackend, Precision

WRITTEN_OUT = (AttentionBackend.EAGER, AttentionBackend.MATH)


@dataclass(frozen=True)
class AttentionShape:
    """b sequences of s tokens, n query heads and k key/value heads of d elements."""

    b: int
    s: int
    n: int
    k: int
    d: int

    @property
    def q_numel(self) -> int:
        return self.b * self.n * self.s * self.d

    @property
    def kv_numel(self) -> int:
        return self.b * self.k * self.s * self.d

    @property
    def weights_numel(self) -> int:
        return self.b * self.n * self.s * self.s


def choose_backend(
    asked: AttentionBackend, device_type: str, precision: Precision, shape: AttentionShape, dropout: float
) -> AttentionBackend:
    """The kernel that ``auto`` stands for.

    CUDA, torch 2.11 on sm_90 (sdp_utils.cpp, priority cuDNN, flash, memory-efficient, math): cuDNN for half
    precision with head_dim up to 128 and a multiple of 8, flash up to 256, memory-efficient for fp32, math for
    fp32 with grouped heads. CPU (sdp_utils_cpp.cpp): flash without dropout, else math.
    """
    if asked is not AttentionBackend.AUTO:
        return asked
    if device_type == "cpu":
        return AttentionBackend.MATH if dropout else AttentionBackend.FLASH
    if precision is not Precision.FP32 and shape.d % 8 == 0 and shape.d <= 256:
        return AttentionBackend.CUDNN if shape.d <= 128 else AttentionBackend.FLASH
    return AttentionBackend.MATH if shape.n != shape.k else AttentionBackend.MEM_EFFICIENT


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def fused(
    ops: Ops, q: Tensor, k: Tensor, v: Tensor, a: AttentionShape, backend: AttentionBackend, dropout: float
) -> Tensor:
    """Flash, cuDNN, memory-efficient (and the CPU's flash): keeps q, k, v, the output and log-sum-exp per row."""
    size, tape, gpu = q.itemsize, ops.tape, ops.tape.trace.on_device_kernels
    rows = a.b * a.n * a.s
    seeds = {AttentionBackend.FLASH: 2, AttentionBackend.CUDNN: 2}.get(backend, 0) if gpu else 0
    grouped = a.n != a.k

    def backward(grads: Grads) -> Grads:
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
            tiles = a.b * a.n * _round_up(a.s, 64) // 64  # an fp32 accumulator and a header of 16 B for each
            ops.scratch(tiles * (FP32 * 64 * _round_up(a.d, 64) + 16), "attention backward workspace")
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
        return [gq, gk, gv]

    node = tape.node([q, k, v], backward, [k, q, v])  # declared by name: key, query, value
    cudnn, random_state = backend is AttentionBackend.CUDNN, []
    if cudnn:  # made before the graph runs; flash makes them while it does
        random_state = [ops.kept_or(1, 8, "attention random state") for _ in range(seeds)]
    out = ops.kept_or(a.q_numel, size, "attention output")
    lse_rows = a.b * a.n * (_round_up(a.s, 32) if backend is AttentionBackend.MEM_EFFICIENT else a.s)
    lse = ops.kept_or(lse_rows, FP32, "log-sum-exp")
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


def repeat_kv(ops: Ops, x: Tensor, a: AttentionShape, label: str) -> Tensor:
    """repeat_interleave over heads: a copy; backward sums each group."""
    kv, size, tape = a.kv_numel, x.itemsize, ops.tape
    node = tape.node([x], lambda _: [tape.new(kv, size, label + " summed gradient")])
    y = ops.new(a.q_numel, size, label + " repeated")
    y.node = node
    return y


def _matmul(ops: Ops, x: Tensor, y: Tensor, numel: int, label: str, grad_copy: int = 0) -> Tensor:
    """Batched product; keeps both; backward: (a contiguous copy of the gradient,) y's gradient, x's gradient."""
    nx, ny, size, tape = x.numel, y.numel, x.itemsize, ops.tape
    needs_x, needs_y = x.node is not None, y.node is not None

    def backward(grads: Grads) -> Grads:
        copy = tape.new(grad_copy, size, label + " gradient, contiguous") if grad_copy else None
        if copy is not None:
            grads[0] = copy
        gy = tape.new(ny, size, label + " gradient") if needs_y else None
        gx = tape.new(nx, size, label + " gradient") if needs_x else None
        return [gx, gy]

    # Each is kept for the other's gradient; declared by name: mat2, self.
    node = tape.node([x, y], backward, [y if needs_x else None, x if needs_y else None])
    out = ops.kept_or(numel, size, label)
    out.node = node
    return out


def _copy(ops: Ops, x: Tensor, label: str) -> Tensor:
    """A contiguous copy, as matmul makes of transposed operands; the gradient passes through."""
    y = ops.new(x.numel, x.itemsize, label + " contiguous")
    y.node = ops.tape.node([x], lambda g: [g[0]])
    return y


def _side_by_side(ops: Ops, x: Tensor, a: AttentionShape, label: str) -> Tensor:
    """Heads that lie across tokens, [b, s, n, d] in memory, as bmm takes them: [b * n, s, d], a view if b is 1."""
    return _copy(ops, x, label) if a.b > 1 else x


def _softmax(ops: Ops, x: Tensor, label: str) -> Tensor:
    """Softmax: keeps its output; the CUDA backward first makes grad * output (SoftMax.cu)."""
    numel, size, tape = x.numel, x.itemsize, ops.tape

    def backward(grads: Grads) -> Grads:
        g = tape.new(numel, size, label + " gradient")
        ops.scratch(numel * size, "softmax backward product")
        return [g]

    node = tape.node([x], backward)
    y = ops.new(numel, size, label)
    tape.save(node, y)
    y.node = node
    return y


def eager(ops: Ops, q: Tensor, k: Tensor, v: Tensor, a: AttentionShape, dropout: float) -> Tensor:
    """matmul, scale, mask, fp32 softmax, (dropout,) matmul: four [b, n, s, s] tensors, two of them kept."""
    size, square = q.itemsize, a.s * a.s
    grouped = a.n != a.k
    if grouped:
        k, v = repeat_kv(ops, k, a, "key"), repeat_kv(ops, v, a, "value")
    cq = _side_by_side(ops, q, a, "query")
    ck = k if grouped else _side_by_side(ops, k, a, "key")
    weights = _matmul(ops, cq, ck, a.weights_numel, "attention scores")
    del cq, ck
    weights = ops._unary(weights, "scaled scores", False, "scaled scores gradient")
    causal = ops.new(square, BOOL, "causal mask")
    lower = ops.new(square, BOOL, "causal mask")
    causal = lower
    inverted = ops.new(square, BOOL, "causal mask")
    node = ops.tape.node([weights], _same(ops, weights, "masked scores gradient"), [inverted])
    masked = ops.new(weights.numel, size, "masked scores")
    masked.node = node
    del inverted
    weights = masked
    del masked, node
    wide = ops.cast(weights, FP32, "scores, fp32")
    soft = _softmax(ops, wide, "attention weights, fp32")
    del wide
    narrow = ops.cast(soft, size, "attention weights")
    del soft
    weights = narrow
    del narrow
    if dropout:
        weights = ops.dropout(weights, "attention dropout")
    cv = v if grouped else _side_by_side(ops, v, a, "value")
    out = _matmul(ops, weights, cv, a.q_numel, "attention output", grad_copy=a.q_numel if a.b > 1 else 0)
    del cv  # then the function's local variables, in their order
    del k, v
    del weights
    del causal, lower
    return out


def _same(ops: Ops, x: Tensor, label: str):  # type: ignore[no-untyped-def]
    numel, size, tape = x.numel, x.itemsize, ops.tape
    return lambda _: [tape.new(numel, size, label)]


def math(ops: Ops, q: Tensor, k: Tensor, v: Tensor, a: AttentionShape, dropout: float) -> Tensor:
    """SDPA's math kernel: everything in fp32, and [b, n, s, s] weights kept.

    Its C++ locals (fp32 q, k and v, repeated k and v, the scaled q, the mask) live until it returns. The mask is added
    in place, unless a dispatch mode is active (areAnyTensorSubclassLike), as on the CPU.
    """
    size, square, tape = q.itemsize, a.s * a.s, ops.tape
    gpu = tape.trace.on_device_kernels
    grouped = a.n != a.k
    q32, k32, v32 = ops.cast(q, FP32, "query, fp32"), ops.cast(k, FP32, "key, fp32"), ops.cast(v, FP32, "value, fp32")
    scaled_q = ops._unary(q32, "scaled query", False, "query gradient")
    ones = ops.new(square, BOOL, "causal mask")
    lower = ops.new(square, BOOL, "causal mask")
    del ones
    chosen = [ops.new(1, FP32, "mask values") for _ in range(2 if gpu else 0)]  # 0 where it holds, -inf elsewhere
    mask = ops.new(square, FP32, "additive causal mask")
    del chosen, lower
    held = [q32, k32, v32, scaled_q, mask]
    del q32, mask
    if grouped:
        k32, v32 = repeat_kv(ops, k32, a, "key"), repeat_kv(ops, v32, a, "value")
        held += [k32, v32]
    scaled_k = ops._unary(k32, "scaled key", False, "key gradient")
    cq = _side_by_side(ops, scaled_q, a, "query")
    ck = scaled_k if grouped else _side_by_side(ops, scaled_k, a, "key")
    scores = _matmul(ops, cq, ck, a.weights_numel, "attention scores")
    del cq, ck, scaled_k
    if not gpu:
        masked = ops.new(a.weights_numel, FP32, "masked scores")
        masked.node = tape.node([scores], lambda g: [g[0]])
        scores = masked
        del masked
    soft = _softmax(ops, scores, "attention weights")
    if gpu:  # _safe_softmax looks for fully masked rows: a bool per score and one per row
        masked_scores = ops.new(a.weights_numel, BOOL, "masked scores, bool")
        row = ops.new(a.weights_numel // a.s, BOOL, "masked rows")
        ops.scratch(FP32, "mask values")  # the zero that they get
        del row, masked_scores
    del scores
    if dropout:
        soft = ops.dropout(soft, "attention dropout")
    returned = ops.new(soft.numel, size, "attention weights, returned") if size != FP32 else None
    cv = v32 if grouped else _side_by_side(ops, v32, a, "value")
    out = _matmul(ops, soft, cv, a.q_numel, "attention output", grad_copy=a.q_numel if a.b > 1 else 0)
    del soft, cv
    out = ops.cast(out, size, "attention output")
    held.clear()
    del returned
    return out


def in_heads(
    ops: Ops, q: Tensor, k: Tensor, v: Tensor, a: AttentionShape, backend: AttentionBackend
) -> tuple[Tensor, Tensor, Tensor]:
    """x.view(b, s, n, d).transpose(1, 2) of each. Backward: a copy, where the gradient's heads lie one after another.

    Eager and math leave gradients [b, n, s, d] in memory, but that of the key [b, n, d, s], which needs no copy to be
    seen as [b, s, n * d], unless repeated heads were summed. Fused kernels write [b, s, n, d].
    """
    if backend not in WRITTEN_OUT:
        return q, k, v
    if a.n > 1:  # a single head lies as its Linear's output does
        q = _gradient_copied(ops, q, "query")
    if a.k > 1:
        k = _gradient_copied(ops, k, "key") if a.n != a.k else k
        v = _gradient_copied(ops, v, "value")
    return q, k, v


def flattened_key(ops: Ops, k: Tensor, a: AttentionShape, backend: AttentionBackend) -> Tensor:
    """The key as its Linear gave it. Backward: the gradient, [b, n, d, s] in memory, as rows: a copy, unless b is 1."""
    copied = backend in WRITTEN_OUT and a.n == a.k and a.b > 1
    return _gradient_copied(ops, k, "key") if copied else k


def _gradient_copied(ops: Ops, x: Tensor, label: str) -> Tensor:
    numel, size, tape = x.numel, x.itemsize, ops.tape
    return x.view(node=tape.node([x], lambda _: [tape.new(numel, size, label + " gradient, contiguous")]))


def attention(
    ops: Ops, q: Tensor, k: Tensor, v: Tensor, a: AttentionShape, backend: AttentionBackend, dropout: float
) -> Tensor:
    """q [b, n, s, d], k and v [b, k, s, d] -> [b, n, s, d]."""
    if backend in WRITTEN_OUT:
        run = eager if backend is AttentionBackend.EAGER else math
        return run(ops, q, k, v, a, dropout)
    if backend is AttentionBackend.MEM_EFFICIENT and a.n != a.k:
        k, v = repeat_kv(ops, k, a, "key"), repeat_kv(ops, v, a, "value")
    return fused(ops, q, k, v, a, backend, dropout)


def autocast_attention(
    ops: Ops, q: Tensor, k: Tensor, v: Tensor, a: AttentionShape, backend: AttentionBackend, dropout: float
) -> Tensor:
    """``attention`` of what autocast makes of q, k and v; the caller's stay as they are.

    They are in the autocast type already behind plain Linears; quantized ones give back their input's type.
    """
    if ops.amp is not None:
        v, k, q = (  # the arguments of a C++ call, from the last to the first
            ops.cast(t, ops.amp, f"{name}, autocast copy") for t, name in ((v, "value"), (k, "key"), (q, "query"))
        )
    return attention(ops, q, k, v, a, backend, dropout)


def contiguous(ops: Ops, y: Tensor, backend: AttentionBackend) -> Tensor:
    """y.transpose(1, 2).reshape(b, s, n * d): a copy after eager and math; fused kernels write that layout."""
    return _copy(ops, y, "attention output") if backend in WRITTEN_OUT else y
