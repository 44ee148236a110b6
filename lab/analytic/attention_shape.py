"""The sizes of an attention layer, and the kernel that does it."""

from __future__ import annotations

from dataclasses import dataclass

from lab.vocab import AttentionBackend, Precision

CUDNN_WIDEST = 256  # elements per head, on sm_90; check_cudnn_tensor_shapes


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

    CUDA, torch 2.11 on sm_90 (sdp_utils.cpp, priority cuDNN, flash, memory-efficient, math): cuDNN for half precision
    with head_dim up to 256 and a multiple of 8, and more than one token; flash for half precision up to 256;
    memory-efficient without grouped heads, head_dim a multiple of 16 bytes (minimum_gemm_alignment); else math. CPU
    (sdp_utils_cpp.cpp): flash without dropout, else math.
    """
    if asked is not AttentionBackend.AUTO:
        return asked
    if device_type == "cpu":
        return AttentionBackend.MATH if dropout else AttentionBackend.FLASH
    half = precision is not Precision.FP32
    if half and shape.d % 8 == 0 and shape.d <= CUDNN_WIDEST and shape.s > 1:
        return AttentionBackend.CUDNN
    if half and shape.d <= 256:
        return AttentionBackend.FLASH
    if shape.n == shape.k and takes_heads(precision, shape.d):
        return AttentionBackend.MEM_EFFICIENT
    return AttentionBackend.MATH


def pads_heads(backend: AttentionBackend, shape: AttentionShape, gpu: bool) -> bool:
    """Flash on a GPU takes heads of whole 8 elements: shorter ones are padded by scaled_dot_product_attention."""
    return gpu and backend is AttentionBackend.FLASH and shape.d % 8 != 0


def choose_masked_backend(
    asked: AttentionBackend, device_type: str, precision: Precision, shape: AttentionShape, dropout: float
) -> AttentionBackend:
    """The kernel that ``auto`` stands for where a mask is given, so that all heads are query heads.

    CUDA, torch 2.11 on sm_90 (sdp_utils.cpp, check_for_attn_mask, check_cudnn_tensor_shapes,
    check_head_dim_size_mem_efficient): flash takes no mask; cuDNN as without one; memory-efficient rows of heads that
    are aligned to 16 bytes; else math. CPU (sdp_utils_cpp.cpp): as without a mask.
    """
    if asked is not AttentionBackend.AUTO:
        return asked
    if device_type == "cpu":
        return AttentionBackend.MATH if dropout else AttentionBackend.FLASH
    if precision is not Precision.FP32 and shape.d % 8 == 0 and shape.d <= CUDNN_WIDEST and shape.s > 1:
        return AttentionBackend.CUDNN
    return AttentionBackend.MEM_EFFICIENT if takes_heads(precision, shape.d) else AttentionBackend.MATH


def takes_heads(precision: Precision, head_dim: int) -> bool:
    """Can the memory-efficient kernel? Its rows are read 16 bytes at a time (minimum_gemm_alignment)."""
    return head_dim % (4 if precision is Precision.FP32 else 8) == 0
