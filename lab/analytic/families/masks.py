"""transformers' masks, built once per forward (masking_utils.py: sdpa_mask, eager_mask; 5.17 and 5.24 do the same)."""

from __future__ import annotations

from dataclasses import dataclass

from lab.analytic.attention_shape import AttentionShape
from lab.analytic.ops import Ops
from lab.analytic.tape import BOOL, INT64, Tensor


@dataclass
class Masks:
    """What the blocks are given: full layers one, sliding layers the other; None: SDPA is told that it is causal.

    From eager attention they are numbers to be added, for SDPA bools.
    """

    full: Tensor | None = None
    sliding: Tensor | None = None


def bool_mask(ops: Ops, a: AttentionShape, sliding: bool, padding: Tensor | None) -> Tensor:
    """sdpa_mask without vmap: [1, 1, s, s], seen as [b, 1, s, s]; with ``padding`` [b, s] it is that large.

    A causal mask is one comparison; a window's, and one with padding, comes of and_masks.
    """
    held = [ops.new(a.b, INT64, "mask indices"), ops.new(1, INT64, "mask indices")]
    for _ in range(2):
        plain = ops.new(a.s, INT64, "mask indices")
        held.append(ops.new(a.s, INT64, "mask indices"))
        del plain
    square = a.s * a.s
    so_far = ops.new(1, BOOL, "causal mask") if padding is not None else None
    allowed = _window(ops, a) if sliding else ops.new(square, BOOL, "causal mask")
    if padding is not None:
        so_far = _both(ops, square, so_far, [allowed])
        del allowed
        so_far = _both(ops, a.b * square, so_far, [_looked_up(ops, a)])
        allowed = so_far
    del held, so_far
    return allowed


def _window(ops: Ops, a: AttentionShape) -> Tensor:
    """and_masks(sliding_window_overlay, causal_mask_function): True, then each mask, then both of them."""
    square = a.s * a.s
    so_far = ops.new(1, BOOL, "causal mask")
    first = ops.new(a.s, INT64, "mask indices")  # q_idx - sliding_window
    inside = ops.new(square, BOOL, "causal mask")
    del first
    so_far = _both(ops, square, so_far, [inside])
    del inside
    return _both(ops, square, so_far, [ops.new(square, BOOL, "causal mask")])


def _both(ops: Ops, numel: int, so_far: Tensor | None, mask: list[Tensor]) -> Tensor:
    """result & mask, which is let go of."""
    both = ops.new(numel, BOOL, "causal mask")
    mask.clear()
    return both


def _looked_up(ops: Ops, a: AttentionShape) -> Tensor:
    """padding_mask[batch_idx, kv_idx]: CUDA first brings both indices to one shape (TensorAdvancedIndexing.cpp)."""
    gpu = ops.tape.trace.on_device_kernels
    indices = [ops.new(a.b * a.s, INT64, "mask indices") for _ in range(2 if gpu else 0)]
    mask = ops.new(a.b * a.s, BOOL, "attention mask, bool")
    del indices
    return mask


def as_numbers(ops: Ops, a: AttentionShape, allowed: list[Tensor], size: int) -> Tensor:
    """eager_mask: [b, 1, s, s] in the hidden states' type, 0 where a token may look, the type's minimum elsewhere.

    ``allowed`` is let go of.
    """
    zero = ops.new(1, size, "mask zero")
    mask = ops.new(a.b * a.s * a.s, size, "additive causal mask")
    del zero
    allowed.clear()
    return mask
