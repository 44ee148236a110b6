"""`single` and `ddp`: every rank holds everything; DDP adds flat gradient buckets."""

from __future__ import annotations

from lab.analytic.architecture import ParameterSpec
from lab.analytic.ops import Parameter
from lab.analytic.sharding.base import Rule
from lab.analytic.tape import Tensor
from lab.units import MIB
from lab.vocab import MemoryCategory


class Single(Rule):
    """One process. Parameters, gradients and optimizer state in full."""


class DDP(Rule):
    """DistributedDataParallel (torch/csrc/distributed/c10d/reducer.cpp).

    Gradients are copied into flat buckets, which live as long as the model: a second copy of all gradients.
    With ``gradient_as_bucket_view`` each gradient, once made, is moved into its bucket and becomes a view of it.
    The first backward has one bucket for everything (distributed.py, _ddp_init_helper); at the next forward the
    buckets are made anew in the order in which gradients arrived: 1 MiB, then ``bucket_cap_mb``.

    Left out: NCCL's watchdog (100 ms) decides when the first bucket is really freed, because the all-reduce's
    Work holds it (ProcessGroupNCCL, stashed_for_allocator_safety_); very fast first steps keep it longer.
    """

    def build(self) -> None:
        super().build()
        self.buckets = self._buckets(self.specs, [sum(s.numel for s in self.specs) * self.parameter_itemsize])
        self.arrived: list[ParameterSpec] = []
        self.rebuilt = False

    def _buckets(self, order: list[ParameterSpec], caps: list[int]) -> list[Tensor]:
        """Sizes as compute_bucket_assignment_by_size: a bucket closes when it reaches its cap, in bytes."""
        category = (
            MemoryCategory.GRADIENTS if self.cfg.parallel.ddp.gradient_as_bucket_view else MemoryCategory.COMM_BUFFERS
        )
        size = self.parameter_itemsize
        sizes, filled = [], 0
        for spec in order:
            filled += spec.numel
            if filled * size >= caps[0]:
                sizes.append(filled)
                filled = 0
                caps = caps[1:] or caps
        if filled:
            sizes.append(filled)
        return [self.tape.new(n, size, "DDP bucket", category) for n in sizes]

    def grad_ready(self, spec: ParameterSpec, parameter: Parameter) -> None:
        if not self.rebuilt and self.last_micro_step:
            self.arrived.append(spec)
        if self.cfg.parallel.ddp.gradient_as_bucket_view and self.last_micro_step:
            parameter.accumulator.grad = None

    def start_step(self) -> None:
        # Reducer::rebuild_buckets runs at the second forward: new buckets are made, then the old dropped.
        if self.arrived and not self.rebuilt:
            self.rebuilt = True
            old = self.buckets
            self.buckets = self._buckets(self.arrived, [MIB, int(self.cfg.parallel.ddp.bucket_cap_mb * MIB)])
            del old
