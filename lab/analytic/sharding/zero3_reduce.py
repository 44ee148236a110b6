"""ZeRO-3's gradients: the reduce bucket and what a reduction takes for a moment.

Source: DeepSpeed 0.19.8, runtime/zero/stage3.py (names are its own) and runtime/comm/coalesced_collectives.py.
N = world_size, e = bytes per gradient element (that of the parameters), shard = ceil(numel / N).

``contiguous_gradients``: a bucket of e * ``reduce_bucket_size``, made once and kept, whatever ``overlap_comm``;
gradients move into it as they are made, unless they are larger. Once the next one would not fit, and at the end of
backward, what is there is reduced:

- ``reduce_scatter``: torch.cat of all shards, rank by rank and padded, e * N * sum of shards; one gradient that needs
  no padding is reduced where it is. gloo reduces a clone of the input (ProcessGroupGloo.cpp).
- else: an all-reduce of the bucket in place, then its product with ``gradient_predivide_factor``, a copy; where a
  rank's part is short of a shard, zeros of e * shard (on the last ranks: the worst ones).

The result is copied, or from the second micro-step on added, to the rank's persistent gradient shards.
"""

from __future__ import annotations

from lab.analytic.sharding.zero3_gather import COMM, Sharded
from lab.analytic.tape import Tape, Tensor
from lab.config import ZeroOptions

REDUCE_STREAM = 2  # reduce_and_partition_stream, with overlap_comm


class Reducer:
    """IPGBucketZ3 and __reduce_and_partition_ipg_grads. ``rank`` matters without reduce-scatter only."""

    def __init__(self, tape: Tape, options: ZeroOptions, world: int, rank: int, itemsize: int) -> None:
        self.tape, self.options, self.world, self.rank, self.itemsize = tape, options, world, rank, itemsize
        self.waiting: list[Sharded] = []  # IPGBucketZ3.params
        self.numel = 0  # IPGBucketZ3.elements
        self.buffer: Tensor | None = None
        if options.contiguous_gradients:
            self.buffer = tape.new(options.reduce_bucket_size, itemsize, "ZeRO-3 reduce bucket", COMM)

    def takes(self, numel: int) -> bool:
        """Is there room for so many elements more, before anything is reduced?"""
        return self.numel + numel <= self.options.reduce_bucket_size

    def add(self, p: Sharded) -> None:
        """reduce_independent_p_g_buckets_and_remove_grads, the hook on every gradient."""
        if self.waiting and not self.takes(p.numel):
            self.reduce()
        if self.buffer is not None and self.takes(p.numel):
            p.parameter.accumulator.grad = self.buffer.view(p.numel)
        self.waiting.append(p)
        self.numel += p.numel

    def add_quietly(self, params: list[Sharded]) -> None:
        """``add`` of each where all fit: a gradient in the bucket is a view of it, which nobody asks for."""
        self.waiting += params
        self.numel += sum([p.numel for p in params])

    @property
    def stream(self) -> int:
        """reduce_and_partition_stream."""
        return 0 if self.options.overlap_comm is False else REDUCE_STREAM

    def reduce(self) -> None:
        """Average what waits; its gradients are gone afterwards."""
        if not self.waiting:
            return
        in_bucket = self.buffer is not None and self.numel <= self.options.reduce_bucket_size
        self.tape.trace.stream = self.stream
        held = self._all_reduce() if in_bucket and not self.options.reduce_scatter else self._reduce_scatter()
        for p in self.waiting:
            p.parameter.accumulator.grad = None
        held.clear()
        self.tape.trace.stream = 0
        self.waiting, self.numel = [], 0

    def _all_reduce(self) -> list[Tensor]:
        """avg_scatter_contiguous_grads."""
        if self.world == 1:
            return []
        held = [self.tape.new(self.numel, self.itemsize, "averaged bucket", COMM)]
        for p in self.waiting:
            if p.numel < (self.rank + 1) * p.shard_numel:
                held.append(self.tape.new(p.shard_numel, self.itemsize, "padded gradient shard", COMM))
        return held

    def _reduce_scatter(self) -> list[Tensor]:
        """avg_scatter_grads, reduce_scatter_coalesced."""
        new, size = self.tape.new, self.itemsize
        held: list[Tensor] = []
        padded = sum(p.shard_numel for p in self.waiting) * self.world
        if len(self.waiting) > 1 or padded > self.numel:
            uneven = [p for p in self.waiting if p.numel < p.shard_numel * self.world]
            for rank in range(self.world):
                for p in uneven:
                    short = p.shard_numel - min(max(p.numel - rank * p.shard_numel, 0), p.shard_numel)
                    if short:
                        held.append(new(short, size, "padding", COMM))
            held.append(new(padded, size, "ZeRO-3 reduce-scatter", COMM))
        if not self.tape.trace.on_device_kernels:
            new(padded, size, "gloo's clone of the reduce-scatter input", COMM)
        return held
