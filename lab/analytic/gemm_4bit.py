"""Which way bitsandbytes takes for a 4-bit product on a GPU: its own kernel, or dequantize and F.linear.

Source: bitsandbytes 0.50, backends/cuda/ops.py, _gemm_4bit_use_custom_cuda, the rules for sm_90 (H100, H200). Other
architectures draw the line elsewhere between 5 and 1536 rows; above that all of them dequantize.
"""

from __future__ import annotations

from lab.analytic.ops import Ops
from lab.analytic.tape import FP32

SMALL_WEIGHT = 4 * 1024 * 1024  # elements


def runs_as_one_kernel(
    rows: int, out_features: int, in_features: int, itemsize: int, block_size: int, ops: Ops
) -> bool:
    """True: nothing is allocated but the output. rows x in times [out, in]; itemsize is the compute dtype's."""
    if rows > 1536 or in_features % block_size:
        return False
    if rows <= 4:
        return True
    if itemsize == FP32:
        return rows < 8
    sms, tiles = ops.num_streaming_multiprocessors, -(-out_features // 64)
    if out_features * in_features < SMALL_WEIGHT:
        return rows <= _most_rows_of_small_weight(out_features, in_features, tiles, sms)
    return rows <= 512 and rows <= _most_rows(rows, out_features, in_features, tiles, sms)


def _most_rows_of_small_weight(n: int, k: int, tiles: int, sms: int) -> int:
    if k * 2 < n:
        return 512 if tiles * 3 < sms else 320
    if tiles * 4 <= sms:
        return 32
    return 16 if tiles * 2 <= sms else 0


def _most_rows(rows: int, n: int, k: int, tiles: int, sms: int) -> int:
    """For weights of 4 Mi elements and more."""
    if rows < 8:
        loses = (
            rows >= 6
            and tiles >= 36
            and ((k > n and tiles * 4 < sms * 3) or (k == n and sms * 3 <= tiles * 5 and tiles * 4 < sms * 3))
        )
        return 0 if loses else rows
    for waves, most in ((3, 64), (2, 48), (1, 32)):
        if tiles >= sms * waves:
            return most
    if tiles < sms // 2 or (k >= n and tiles * 4 < sms * 3):
        return 0
    return 16
