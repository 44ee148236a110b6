"""The sizes of an attention layer, and the kernel that does it."""

from __future__ import annotations

from dataclasses import dataclass

from lab.vocab import AttentionBackend, Precision


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
