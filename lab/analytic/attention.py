"""What attention allocates and keeps, by backend. Shapes as in ``lab.model.attention``."""

from __future__ import annotations

from dataclasses import replace

from lab.analytic.attention_fused import fused
from lab.analytic.attention_shape import AttentionShape, pads_heads
from lab.analytic.attention_written_out import contiguous_copy, eager, math, repeat_kv
from lab.analytic.ops import Ops
from lab.analytic.tape import Tensor
from lab.vocab import AttentionBackend

WRITTEN_OUT = (AttentionBackend.EAGER, AttentionBackend.MATH)


def in_heads(
    ops: Ops, q: Tensor, k: Tensor, v: Tensor, a: AttentionShape, backend: AttentionBackend, query_last: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x.view(b, s, n, d).transpose(1, 2) of each. Backward: a copy, where the gradient's heads lie one after another.

    Eager and math leave gradients [b, n, s, d] in memory, but that of the key [b, n, d, s], which needs no copy to be
    seen as [b, s, n * d], unless repeated heads were summed. Fused kernels write [b, s, n, d], but for padded heads.

    ``query_last``: the model views the query after key and value (GPT-2); backward comes to it first then.
    """
    by_head = heads_first(ops, a, backend)
    if by_head and a.n > 1 and not query_last:  # a single head lies as its Linear's output does
        q = ops.gradient_as_rows(q, "query")
    # Repeated heads' gradients are summed; the kernel that takes them repeated leaves [b, k, s, d] of that.
    if a.k > 1 and (by_head or (backend is AttentionBackend.MEM_EFFICIENT and a.n != a.k)):
        k = k if backend in WRITTEN_OUT and a.n == a.k else ops.gradient_as_rows(k, "key")
        v = ops.gradient_as_rows(v, "value")
    if by_head and a.n > 1 and query_last:
        q = ops.gradient_as_rows(q, "query")
    return q, k, v


def heads_first(ops: Ops, a: AttentionShape, backend: AttentionBackend) -> bool:
    """Do the output and the gradients lie in memory one head after another, not one token after another?"""
    return backend in WRITTEN_OUT or pads_heads(backend, a, ops.tape.trace.on_device_kernels)


def key_comes_turned(a: AttentionShape, backend: AttentionBackend) -> bool:
    """Is the key's gradient, [b, n, d, s] in memory, no view of rows? With one sequence it is."""
    return backend in WRITTEN_OUT and a.n == a.k and a.b > 1


def attention(
    ops: Ops, q: Tensor, k: Tensor, v: Tensor, a: AttentionShape, backend: AttentionBackend, dropout: float
) -> Tensor:
    """q [b, n, s, d], k and v [b, k, s, d] -> [b, n, s, d]."""
    if backend in WRITTEN_OUT:
        run = eager if backend is AttentionBackend.EAGER else math
        return run(ops, q, k, v, a, dropout)
    return fused(ops, q, k, v, a, backend, dropout)


def autocast_attention(
    ops: Ops, q: Tensor, k: Tensor, v: Tensor, a: AttentionShape, backend: AttentionBackend, dropout: float
) -> Tensor:
    """``attention`` of what autocast makes of q, k and v; the caller's stay as they are.

    They are in the autocast type already behind plain Linears; quantized ones give back their input's type. Eager
    attention is no one call: each of its products casts for itself. Heads that the memory-efficient kernel needs
    repeated are so before its call, and stay until it returns.
    """
    if backend is AttentionBackend.MEM_EFFICIENT and a.n != a.k:
        k, v, a = repeat_kv(ops, k, a, "key"), repeat_kv(ops, v, a, "value"), replace(a, k=a.n)
    held = [k, v]
    if ops.amp is not None and backend is not AttentionBackend.EAGER:
        v, k, q = (  # the arguments of a C++ call, from the last to the first
            ops.cast(t, ops.amp, f"{name}, autocast copy") for t, name in ((v, "value"), (k, "key"), (q, "query"))
        )
    y = attention(ops, q, k, v, a, backend, dropout)
    del k, q, v, held
    return y


def contiguous(ops: Ops, y: Tensor, a: AttentionShape, backend: AttentionBackend, padded_too: bool = True) -> Tensor:
    """y.transpose(1, 2).reshape(b, s, n * d): a copy where heads lie one after another; a single one is a view.

    ``padded_too``: of a single head that was padded, and cut again, a copy is made (.contiguous(), unlike reshape).
    """
    copied = heads_first(ops, a, backend) and (a.n > 1 or (padded_too and backend not in WRITTEN_OUT))
    return contiguous_copy(ops, y, "attention output") if copied else y
