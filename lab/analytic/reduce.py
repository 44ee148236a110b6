"""Scratch memory of PyTorch's CUDA reductions over rows (aten/src/ATen/native/cuda/Reduce.cuh).

``setReduceConfig`` splits a tall column sum over thread blocks; their partial sums go through
global memory: 4 B x outputs x blocks per output x threads x vector width.
"""

from __future__ import annotations

MAX_THREADS = 512  # MAX_NUM_THREADS
WARP = 32
MIN_VALUES, MAX_VALUES = 16, 256  # per thread
THREADS_PER_SM = 2048  # maxThreadsPerMultiProcessor on sm_80 and sm_90


def _last_pow2(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)


def _div_up(a: int, b: int) -> int:
    return -(-a // b)


def column_partials(rows: int, columns: int, num_sms: int) -> tuple[int, int]:
    """Bytes of what sum(dim=0) of a contiguous [rows, columns] matrix takes while it runs; zeros where it takes none.

    Two allocations: partial sums, and semaphores (one per group of outputs). Source: Reduce.cuh, setReduceConfig,
    ReduceConfig::global_memory_size and semaphore_size; accumulation in fp32.
    """
    vector = next(v for v in (4, 2, 1) if columns % v == 0)
    dim0 = columns // vector
    limit = MAX_THREADS // vector
    dim0_pow2 = _last_pow2(dim0) if dim0 < limit else limit
    dim1_pow2 = _last_pow2(rows) if rows < limit else limit
    width = min(dim0_pow2, WARP)
    height = min(dim1_pow2, limit // width)
    width = min(dim0_pow2, limit // height)
    per_thread = rows
    split = per_thread >= min(height * 16, MAX_VALUES)
    if split:
        per_thread = _div_up(per_thread, height)
    outputs_per_block = width * vector * (1 if split else height)
    grid = _div_up(columns, outputs_per_block)
    target = num_sms * (THREADS_PER_SM // (width * height))
    if not split or per_thread < MAX_VALUES or grid > target:
        return 0, 0
    blocks = max(min(_div_up(target, grid), _div_up(per_thread, MIN_VALUES)), _div_up(per_thread, MAX_VALUES))
    if blocks <= 1:
        return 0, 0
    return 4 * columns * blocks * width * vector, 4 * grid


def norm_workspace_bytes(numel: int, num_sms: int, accumulator_bytes: int = 8) -> int:
    """Bytes that the 2-norm (or sum) of ``numel`` contiguous elements takes while it runs: a partial sum per block.

    ``accumulator_bytes``: 8 for fp64, 4 for fp32 and half precision.
    Source: Reduce.cuh as above, one output, 512 threads along the row. Its semaphore, 4 B, is an allocation of its own.
    """
    per_thread = _div_up(numel, MAX_THREADS)
    if per_thread < MAX_VALUES:
        return 0
    target = num_sms * (THREADS_PER_SM // MAX_THREADS)
    blocks = max(min(target, _div_up(per_thread, MIN_VALUES)), _div_up(per_thread, MAX_VALUES))
    return accumulator_bytes * blocks if blocks > 1 else 0
