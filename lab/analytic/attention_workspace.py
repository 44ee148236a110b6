"""The memory-efficient kernel's scratch memory, by the tiles that it works in.

Source: cuda/mem_eff_attention/kernel_forward.h (kNeedsOutputAccumulatorBuffer), kernel_backward.h (workspace_size,
GradQTempStorage), kernels/cutlassF.h and cutlassB.h: the kernels of sm_80 in the order in which they are asked;
cuda/attention.cu and attention_backward.cu take the first that is wide enough. Read in torch 2.13's headers. Of heads
over 64 elements a committed trace shows fp32 ones of 128 (allocator_trace_ck1b); half-precision ones are read only.
"""

from __future__ import annotations

from lab.analytic.attention_shape import AttentionShape
from lab.analytic.tape import FP32

_HEADER = 16  # bytes: a lock and a counter for each tile
_PARALLEL = 200  # attention_backward.cu: into how many parts, over all heads, the keys are split at most


def accumulates_outside(a: AttentionShape, itemsize: int) -> bool:
    """Does forward sum wide heads' outputs in an fp32 tensor of their own, q's size? Registers hold 128 elements."""
    return itemsize != FP32 and a.d > 128


def _tile(itemsize: int, head_dim: int) -> tuple[int, int, bool]:
    """Query rows, keys, and whether the key's and value's gradients pile up in memory: kOutputInRF is false."""
    if head_dim <= 64:
        return 64, 64, False
    if itemsize == FP32:  # gradients are of the accumulator's type already
        return 128, 64, False
    return (128, 128, False) if head_dim <= 128 else (128, 64, True)


def workspace_bytes(a: AttentionShape, itemsize: int) -> int:
    """One fp32 tile per block of query rows and columns; for wide heads in half precision also for keys and values."""
    rows, keys, piles_up = _tile(itemsize, a.d)
    query = -(-a.s // rows) * -(-a.d // keys) * (_HEADER + FP32 * rows * keys)
    if not piles_up:
        return a.b * a.n * query
    splits = 1 if a.b * a.n >= 256 and a.s <= 2 * keys else -(-a.s // keys)
    splits = max(1, min(splits, _PARALLEL // (a.b * a.n)))
    return a.b * a.n * (query + 2 * FP32 * splits * keys * -(-a.d // rows) * rows)
