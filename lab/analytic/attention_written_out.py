"""Attention as two products and a softmax, which keep squares of the sequence length: eager, and SDPA's math kernel.

Source: lab.model.attention; aten/src/ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math.
"""

from __future__ import annotations

from lab.analytic.attention_shape import AttentionShape
from lab.analytic.ops import Ops
from lab.analytic.tape import BF16, BOOL, FP32, Grads, Tensor


def repeat_kv(ops: Ops, x: Tensor, a: AttentionShape, label: str) -> Tensor:
    """repeat_interleave over heads: a copy; backward sums each group."""
    kv, size, tape = a.kv_numel, x.itemsize, ops.tape
    node = tape.node([x], lambda _: [tape.new(kv, size, label + " summed gradient")])
    y = ops.new(a.q_numel, size, label + " repeated")
    y.node = node
    return y


def expanded_kv(ops: Ops, x: Tensor, a: AttentionShape, label: str) -> Tensor:
    """transformers' repeat_kv of a single head: a view without a copy; backward sums the query heads' gradients."""
    kv, size, tape = a.kv_numel, x.itemsize, ops.tape
    return x.view(a.q_numel, tape.node([x], lambda _: [tape.new(kv, size, label + " summed gradient")]))


def matmul(ops: Ops, x: Tensor, y: Tensor, numel: int, label: str, grad_copy: int = 0) -> Tensor:
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


def contiguous_copy(ops: Ops, x: Tensor, label: str) -> Tensor:
    """A contiguous copy, as matmul makes of transposed operands; the gradient passes through."""
    y = ops.new(x.numel, x.itemsize, label + " contiguous")
    y.node = ops.tape.node([x], lambda g: [g[0]])
    return y


def _side_by_side(ops: Ops, x: Tensor, a: AttentionShape, label: str) -> Tensor:
    """Heads that lie across tokens, [b, s, n, d] in memory, as bmm takes them: [b * n, s, d], a view if b or n is 1."""
    return contiguous_copy(ops, x, label) if lies_across(a) else x


def lies_across(a: AttentionShape) -> bool:
    """Is [b, n, s, d] in the memory of [b, s, n, d] no view of [b * n, s, d]?"""
    return a.b > 1 and a.n > 1


def softmax(ops: Ops, x: Tensor, label: str, wide: bool = False) -> Tensor:
    """Softmax: keeps its output; the CUDA backward first makes grad * output (SoftMax.cu).

    ``wide``: the output is fp32, whatever x is.
    """
    numel, size, tape = x.numel, x.itemsize, ops.tape
    out_size = FP32 if wide else size

    def backward(grads: Grads) -> Grads:
        g = tape.new(numel, size, label + " gradient")
        ops.scratch(numel * out_size, "softmax backward product")
        return [g]

    node = tape.node([x], backward)
    y = ops.new(numel, out_size, label)
    tape.save(node, y)
    y.node = node
    return y


def softmax_in_fp32(ops: Ops, x: Tensor, label: str) -> Tensor:
    """softmax(x, dtype=torch.float32): of an fp32 copy, but of fp16 on CUDA one kernel reads x itself (SoftMax.cpp)."""
    if ops.half_is_fp16 and x.itemsize == BF16 and ops.tape.trace.on_device_kernels:
        return softmax(ops, x, label, wide=True)
    return softmax(ops, ops.cast(x, FP32, "scores, fp32"), label)


def eager(ops: Ops, q: Tensor, k: Tensor, v: Tensor, a: AttentionShape, dropout: float) -> Tensor:
    """matmul, scale, mask, fp32 softmax, (dropout,) matmul: four [b, n, s, s] tensors, two of them kept.

    Under autocast each product takes its operands in half precision, whatever the projections gave.
    """
    given, square = q.itemsize, a.s * a.s
    grouped = a.n != a.k
    if grouped:
        k, v = repeat_kv(ops, k, a, "key"), repeat_kv(ops, v, a, "value")
    y, x = as_operand(ops, k, "key"), as_operand(ops, q, "query")  # of a C++ call, the last argument first
    cq = _side_by_side(ops, x, a, "query")
    ck = y if grouped else _side_by_side(ops, y, a, "key")
    weights = matmul(ops, cq, ck, a.weights_numel, "attention scores")
    del cq, ck, x, y
    weights = ops.unary(weights, "scaled scores", False, "scaled scores gradient")
    causal = ops.new(square, BOOL, "causal mask")
    lower = ops.new(square, BOOL, "causal mask")
    causal = lower
    inverted = ops.new(square, BOOL, "causal mask")
    node = ops.tape.node([weights], _same(ops, weights, "masked scores gradient"), [inverted])
    masked = ops.new(weights.numel, weights.itemsize, "masked scores")
    masked.node = node
    del inverted
    weights = masked
    del masked, node
    soft = softmax_in_fp32(ops, weights, "attention weights, fp32")
    narrow = ops.cast(soft, given, "attention weights")
    del soft
    weights = narrow
    del narrow
    if dropout:
        weights = ops.dropout(weights, "attention dropout")
    y, x = as_operand(ops, v, "value"), as_operand(ops, weights, "attention weights")
    cv = y if grouped else _side_by_side(ops, y, a, "value")
    out = matmul(ops, x, cv, a.q_numel, "attention output", grad_copy=a.q_numel if lies_across(a) else 0)
    del cv, x, y  # then the function's local variables, in their order
    del k, v
    del weights
    del causal, lower
    return out


def as_operand(ops: Ops, x: Tensor, label: str) -> Tensor:
    """What a product takes of x: under autocast a copy in half precision, unless it is in that already."""
    return x if ops.amp is None else ops.cast(x, ops.amp, f"{label}, autocast copy")


def _same(ops: Ops, x: Tensor, label: str):  # type: ignore[no-untyped-def]
    numel, size, tape = x.numel, x.itemsize, ops.tape
    return lambda _: [tape.new(numel, size, label)]


def math(
    ops: Ops,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: AttentionShape,
    dropout: float,
    bias: Tensor | None = None,
    in_order: bool = False,
) -> Tensor:
    """SDPA's math kernel: everything in fp32, and [b, n, s, s] weights kept.

    Its C++ locals (fp32 q, k and v, repeated k and v, the scaled q, the mask) live until it returns. The mask is added
    in place, unless a dispatch mode is active (areAnyTensorSubclassLike).

    ``bias``: an additive mask; without one it makes the causal mask. ``in_order``: k's and v's heads lie one after
    another already, or are views of a single one.
    """
    size, square, tape = q.itemsize, a.s * a.s, ops.tape
    gpu = tape.trace.on_device_kernels
    grouped = a.n != a.k
    q32, k32, v32 = ops.cast(q, FP32, "query, fp32"), ops.cast(k, FP32, "key, fp32"), ops.cast(v, FP32, "value, fp32")
    scaled_q = ops.unary(q32, "scaled query", False, "query gradient")
    if bias is None:
        ones = ops.new(square, BOOL, "causal mask")
        lower = ops.new(square, BOOL, "causal mask")
        del ones
        chosen = [ops.new(1, FP32, "mask values") for _ in range(2 if gpu else 0)]  # 0 where it holds, -inf elsewhere
        bias = ops.new(square, FP32, "additive causal mask")
        del chosen, lower
    held = [q32, k32, v32, scaled_q, bias]
    del q32, bias
    if grouped:
        k32, v32 = repeat_kv(ops, k32, a, "key"), repeat_kv(ops, v32, a, "value")
        held += [k32, v32]
    scaled_k = ops.unary(k32, "scaled key", False, "key gradient")
    cq = _side_by_side(ops, scaled_q, a, "query")
    ck = scaled_k if grouped or in_order else _side_by_side(ops, scaled_k, a, "key")
    scores = matmul(ops, cq, ck, a.weights_numel, "attention scores")
    del cq, ck, scaled_k
    if ops.dispatch_mode:
        masked = ops.new(a.weights_numel, FP32, "masked scores")
        masked.node = tape.node([scores], lambda g: [g[0]])
        scores = masked
        del masked
    soft = softmax(ops, scores, "attention weights")
    if gpu:  # _safe_softmax looks for fully masked rows: a bool per score and one per row
        masked_scores = ops.new(a.weights_numel, BOOL, "masked scores, bool")
        row = ops.new(a.weights_numel // a.s, BOOL, "masked rows")
        ops.scratch(FP32, "mask values")  # the zero that they get
        del row, masked_scores
    del scores
    if dropout:
        soft = ops.dropout(soft, "attention dropout")
    returned = ops.new(soft.numel, size, "attention weights, returned") if size != FP32 else None
    whole_v = grouped or (in_order and v32.storage.nbytes >= v32.numel * FP32)
    cv = v32 if whole_v else _side_by_side(ops, v32, a, "value")
    out = matmul(ops, soft, cv, a.q_numel, "attention output", grad_copy=a.q_numel if lies_across(a) else 0)
    del cv
    out = ops.cast(out, size, "attention output")
    held.clear()
    del returned, soft
    return out
