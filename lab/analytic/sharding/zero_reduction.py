"""How DeepSpeed's stages 1 and 2 reduce gradients: buckets, flattened copies, one partition's share kept.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py; every method names the function there that it replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lab.analytic.architecture import ParameterSpec
from lab.analytic.gradients import group_at
from lab.analytic.ops import Parameter
from lab.analytic.sharding.base import KEPT, PASSED_ON
from lab.analytic.sharding.zero_partitions import FlatGroup
from lab.analytic.sharding.zero_ranks import Partition
from lab.analytic.tape import Tape, Tensor
from lab.config import ZeroOptions
from lab.vocab import MemoryCategory

REDUCTION_STREAM = 1  # DeepSpeedZeroOptimizer.reduction_stream, with overlap_comm
COMM = MemoryCategory.COMM_BUFFERS


def only_overflow(filled: int, numels: Sequence[int], size: int) -> int | None:
    """Which of some gradients is the only one that does not fit into a bucket any more, so that it is emptied first.

    ``filled``: elements in it before; ``size``: its own. None: not exactly one, or one that never fits.
    """
    found: int | None = None
    for i, numel in enumerate(numels):
        if filled + numel > size:
            if found is not None or numel > size:
                return None
            found, filled = i, 0
        filled += numel
    return found


def ranks_differ(options: ZeroOptions, by_micro_step: bool, oversized: bool) -> bool:
    """Does a rank hold gradients outside its partition longer, or less long, than others do?

    Not while they wait in the buckets, which all let go of together. Two buckets that stage 1 keeps to the end go in an
    order that depends on whose gradients are in them, and there ones too large for a bucket stay with their owners.
    """
    return not options.contiguous_gradients or (not by_micro_step and (bool(options.overlap_comm) or oversized))


@dataclass
class Bucket:
    """IPGBucket: gradients that wait for their reduction. ``grads`` keeps them until the bucket is cleared."""

    buffers: list[Tensor] = field(default_factory=list)
    index: int = 0
    params: list[ParameterSpec] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    numel: int = 0

    def clear(self) -> None:
        self.params, self.grads, self.numel = [], [], 0


class Reducer:
    """Gradients from their making to what ranks keep of them: ``partitions``, of the ranks that are replayed.

    Of several only where what they do to gradients outside their partitions is the same (``ranks_differ``).
    ``by_micro_step``: stage 2 (partition_gradients), else stage 1. ``itemsize``: bytes per gradient element.
    """

    def __init__(
        self,
        tape: Tape,
        options: ZeroOptions,
        group: FlatGroup,
        partitions: Sequence[Partition],
        by_micro_step: bool,
        itemsize: int,
    ) -> None:
        self.tape, self.group, self.partitions = tape, group, partitions
        self.by_micro_step, self.itemsize = by_micro_step, itemsize
        self.bucket_size, self.contiguous = options.reduce_bucket_size, options.contiguous_gradients
        self.reduce_scatter = options.reduce_scatter
        self.overlap = bool(options.overlap_comm)  # DeepSpeed's own default is off below stage 3
        self.parameters: dict[str, Parameter] = {}
        self.bucket = Bucket()
        self.ready_for_gradients = False
        self.previous_reduced: list[ParameterSpec] = []  # previous_reduced_grads

    def quiet(self, numel: int, last_micro_step: bool) -> str | None:
        """What ``grad_ready`` does to gradients of so many elements together, as in ``Rule.quiet_gradients``."""
        if not self.ready_for_gradients:
            return None
        if not (self.by_micro_step or (self.overlap and last_micro_step)):
            return KEPT
        if self.bucket.numel + numel > self.bucket_size:
            return None
        return PASSED_ON if self.contiguous else KEPT

    def loud(self, numels: Sequence[int], last_micro_step: bool) -> int | None:
        """As in ``Rule.loud_gradient``."""
        passes = self.by_micro_step or (self.overlap and last_micro_step)
        if not (self.ready_for_gradients and passes and self.contiguous):
            return None
        return only_overflow(self.bucket.numel, numels, self.bucket_size)

    def grads_ready(self, specs: list[ParameterSpec], last_micro_step: bool) -> None:
        """``grad_ready`` of each, all of which fit into the bucket."""
        bucket = self.bucket
        if not (self.by_micro_step or (self.overlap and last_micro_step)):
            return
        for spec in specs:
            accumulator = self.parameters[spec.name].accumulator
            grad = bucket.buffers[bucket.index].view(spec.numel) if self.contiguous else accumulator.grad
            assert grad is not None
            accumulator.grad = grad
            bucket.grads.append(grad)
            bucket.numel += spec.numel
        bucket.params += specs

    def grad_ready(self, spec: ParameterSpec, last_micro_step: bool) -> None:
        """process_gradients, the hook on every parameter."""
        if not (self.by_micro_step or self.overlap or self.contiguous):
            return  # create_gradient_handling_hooks was not called
        self._setup_buckets()
        if self.by_micro_step or (self.overlap and last_micro_step):
            self._add_to_bucket(spec)

    def _setup_buckets(self) -> None:
        if self.contiguous and not self.ready_for_gradients:
            self.bucket.index = 0
            for _ in range(2 if self.overlap else 1):
                self.bucket.buffers.append(self.tape.new(self.bucket_size, self.itemsize, "ZeRO reduce bucket", COMM))
        self.ready_for_gradients = True

    def _add_to_bucket(self, spec: ParameterSpec) -> None:
        """reduce_independent_p_g_buckets_and_remove_grads."""
        bucket, accumulator = self.bucket, self.parameters[spec.name].accumulator
        if bucket.numel + spec.numel > self.bucket_size:
            self._reduce()
            if self.contiguous and self.overlap:
                bucket.index = 1 - bucket.index
        if self.contiguous and spec.numel <= self.bucket_size:  # larger ones stay: extra_large_param_to_reduce
            grad: Tensor | None = bucket.buffers[bucket.index].view(spec.numel)
            accumulator.grad = grad
        else:
            grad = accumulator.grad
        assert grad is not None
        bucket.params.append(spec)
        bucket.grads.append(grad)
        bucket.numel += spec.numel

    def _add_all(self, specs: list[ParameterSpec]) -> None:
        """``_add_to_bucket`` of each; of those that came together and fit at once."""
        bucket, accumulators = self.bucket, [self.parameters[s.name].accumulator for s in specs]
        begin = 0
        while begin < len(specs):
            group = group_at(accumulators, begin)
            together = specs[begin : begin + len(group.accumulators)] if group is not None else []
            numel = sum([s.numel for s in together])
            if group is None or not self.contiguous or bucket.numel + numel > self.bucket_size:
                for spec in together or [specs[begin]]:
                    self._add_to_bucket(spec)
                begin += len(together) or 1
                continue
            begin += len(together)
            group.free(range(len(together)))
            buffer = bucket.buffers[bucket.index]
            for accumulator, spec in zip(group.accumulators, together, strict=True):
                accumulator.own = grad = buffer.view(spec.numel)
                bucket.grads.append(grad)
            bucket.params += together
            bucket.numel += numel

    def _reduce(self) -> None:
        """reduce_ipg_grads: average what is in the bucket, then keep this partition's gradients."""
        bucket = self.bucket
        self.tape.trace.stream = REDUCTION_STREAM if self.overlap else 0
        if self.contiguous and self.reduce_scatter:
            # average_tensor reduces the bucket in place unless ranks share it: then slices are flattened, a group
            # closing once it exceeds reduce_bucket_size (allreduce_and_scatter); one slice needs no copy.
            group: list[int] = []
            for numel in self.group.reduced_slices(bucket.params):
                group.append(numel)
                if sum(group) > self.bucket_size:
                    self._flatten(group)
                    group = []
            self._flatten(group)
        elif not self.contiguous and bucket.params:  # allreduce_and_copy of everything in the bucket
            if self.overlap:
                self._drop_previous_reduced()
            self._flatten([s.numel for s in bucket.params])
        for spec in bucket.params:
            owners = [p for p in self.partitions if spec.name in p.own]
            if self.contiguous:
                for partition in owners:
                    partition.copy(spec)
                if self.by_micro_step or len(owners) == len(self.partitions):
                    self.parameters[spec.name].accumulator.grad = None
            elif not owners and self.by_micro_step:
                if self.overlap:
                    self.previous_reduced.append(spec)
                else:
                    self.parameters[spec.name].accumulator.grad = None
        self.tape.trace.stream = 0
        bucket.clear()

    def _flatten(self, slices: list[int]) -> None:
        """allreduce_bucket: a flat copy, reduced and copied back; a single slice is reduced where it is."""
        if len(slices) > 1:
            self.tape.new(sum(slices), self.itemsize, "flattened bucket", COMM)

    def _drop_previous_reduced(self) -> None:
        for spec in self.previous_reduced:
            self.parameters[spec.name].accumulator.grad = None
        self.previous_reduced = []

    def finish_backward(self, specs: list[ParameterSpec], last_micro_step: bool) -> None:
        """engine.allreduce_gradients: stage 2 after every micro-step, stage 1 after the last.

        ``specs``: all parameters in the model's order (reduce_gradients).
        """
        if not self.by_micro_step:
            if not last_micro_step:
                return
            if not self.overlap:
                self._add_all(specs)
        self._reduce()
        self._drop_previous_reduced()
        for partition in self.partitions:
            gradients = partition.copied
            if not self.contiguous:
                own = [self.parameters[s.name].accumulator.grad for s in partition.members]
                gradients = [g for g in own if g is not None]
                del own
            partition.accumulate(gradients, last_micro_step)
            del gradients
        if self.contiguous:  # _release_ipg_buffers
            self.bucket.buffers.clear()
            for partition in self.partitions:
                partition.buffer = None
        self.ready_for_gradients = False
        for parameter in self.parameters.values():  # _clear_param_grad_only
            parameter.accumulator.grad = None
        for partition in self.partitions:
            partition.copied.clear()
