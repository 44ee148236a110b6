"""transformers' eager_attention_forward."""

from __future__ import annotations

from lab.analytic.attention_shape import AttentionShape
from lab.analytic.attention_written_out import (
    contiguous_copy,
    expanded_kv,
    lies_across,
    matmul,
    repeat_kv,
    softmax,
    softmax_in_fp32,
)
from lab.analytic.ops import Ops
from lab.analytic.tape import Tensor


def eager_attention(
    ops: Ops, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, a: AttentionShape, dropout: float, gpt2: bool
) -> tuple[Tensor, Tensor]:
    """(output [b, s, n, d], weights [b, n, s, s]): product, scale, plus mask, fp32 softmax, back to a narrower type.

    GPT-2 takes the softmax in its input's type (autocast: fp32) and goes back to the value's type, the others to the
    query's, which is fp32 under autocast.
    """
    query_size, value_size = q.itemsize, v.itemsize
    if a.n != a.k:
        repeat = expanded_kv if a.k == 1 else repeat_kv
        k, v = repeat(ops, k, a, "key"), repeat(ops, v, a, "value")
    weights = _heads_product(ops, q, k, a.weights_numel, "attention scores", a)
    weights = ops.unary(weights, "scaled scores", False, "scaled scores gradient")
    weights = ops.add(weights, mask, "masked scores", broadcast=True)
    in_fp32 = ops.amp is not None or not gpt2
    soft = (softmax_in_fp32 if in_fp32 else softmax)(ops, weights, "attention weights")
    if gpt2:
        del weights  # its variable has the softmax now; the others' line goes on with .to()
    narrowed = ops.cast(soft, value_size if gpt2 else query_size, "attention weights")
    del soft
    weights = narrowed
    del narrowed
    if dropout:
        weights = ops.dropout(weights, "attention dropout")
    out = _heads_product(ops, weights, v, a.q_numel, "attention output", a, whole_x=True)
    return (contiguous_copy(ops, out, "attention output") if a.n > 1 else out), weights


def _heads_product(
    ops: Ops, x: Tensor, y: Tensor, numel: int, label: str, a: AttentionShape, whole_x: bool = False
) -> Tensor:
    """torch.matmul over [b, n, ...]: heads that lie across tokens are copied, unless there is one sequence or one head.

    Repeated heads lie side by side; a single expanded head is copied unless a cast has just done it.
    """
    given = y.storage
    if ops.amp is not None:  # the arguments of a C++ call, from the last to the first
        y = ops.cast(y, ops.amp, label + ", autocast copy")
        x = ops.cast(x, ops.amp, label + ", autocast copy")
    expanded = a.k == 1 < a.n and y.storage is given
    arguments = [x, y]  # of the C++ call: the autocast copies live until it returns
    del given
    if not whole_x and lies_across(a):
        x = contiguous_copy(ops, x, label + " operand")
    if (expanded or a.n == a.k) and lies_across(a):
        y = contiguous_copy(ops, y, label + " operand")
    out = matmul(ops, x, y, numel, label, grad_copy=numel if whole_x and lies_across(a) else 0)
    arguments.clear()
    return out
