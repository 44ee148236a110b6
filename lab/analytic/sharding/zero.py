"""`zero1`, `zero2`: DeepSpeed's ZeRO stages 1 and 2 with a client torch optimizer.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (class and attribute names below are its own) and
runtime/engine.py. N = world_size, P = elements of one partition (``zero_partitions.FlatGroup``), e = bytes per
parameter element (2 in half precision, 4 in fp32), m = bytes per master element (2 with bf16_pure, else 4).

===================================  ==============================================  ===========================
buffer                               bytes                                           lives
===================================  ==============================================  ===========================
bit16_groups_flat                    e * N * P; the parameters are views of it       always
single_partition_of_fp32_groups      m * P, a clone also in fp32                     always
AdamW exp_avg, exp_avg_sq            m * P each                                      from the first step on
ipg_buckets[].buffer                 e * reduce_bucket_size, twice with overlap_comm  a backward's first gradient
                                                                                     until its reduction's end
allreduce_bucket's flattened copy    e * what is reduced at once                     during each reduction
grads_in_partition                   e * whole size of the parameters that overlap   first own gradient reduced
                                     the rank's partition                            until the step
get_norm_dtype copy                  8 * a gradient slice, one at a time (fp64)      gradient norm
flat_grad_partition                  e * P                                           until cast
single_grad_partition                m * P                                           optimizer step
===================================  ==============================================  ===========================

``allgather_bucket_size`` sizes nothing here: the updated partitions are gathered straight into the flat group.
Left out: scalars that live for one kernel, and fp16 steps skipped for an overflow (no state is made in them).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lab.analytic.architecture import ParameterSpec
from lab.analytic.ops import Parameter
from lab.analytic.sharding.base import Rule
from lab.analytic.sharding.zero_partitions import FlatGroup
from lab.analytic.tape import FP32, Tape, Tensor
from lab.config import RunConfig
from lab.vocab import MemoryCategory, Precision

FP64 = 8  # bytes; zero/utils.py, get_norm_dtype
REDUCTION_STREAM = 1  # DeepSpeedZeroOptimizer.reduction_stream, with overlap_comm
PARAMETERS, MASTER = MemoryCategory.PARAMETERS, MemoryCategory.MASTER_WEIGHTS
GRADIENTS, COMM = MemoryCategory.GRADIENTS, MemoryCategory.COMM_BUFFERS


@dataclass
class Bucket:
    """IPGBucket: gradients that wait for their reduction."""

    buffers: list[Tensor] = field(default_factory=list)
    index: int = 0
    params: list[ParameterSpec] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    numel: int = 0

    def clear(self) -> None:
        self.params, self.grads, self.numel = [], [], 0


class ZeroRule(Rule):
    """What stages 1 and 2 share (DeepSpeedZeroOptimizer)."""

    deepspeed = True
    partition_gradients = False  # stage 2

    def __init__(self, cfg: RunConfig, tape: Tape, specs: list[ParameterSpec]) -> None:
        super().__init__(cfg, tape, specs)
        z = cfg.parallel.zero
        self.bucket_size, self.contiguous, self.reduce_scatter = (
            z.reduce_bucket_size,
            z.contiguous_gradients,
            z.reduce_scatter,
        )
        self.overlap = bool(z.overlap_comm)  # DeepSpeed's own default is off below stage 3
        self.group = FlatGroup(specs, self.world, z.round_robin_gradients)
        self.partition = self.group.partition_numel
        self.bucket = Bucket()
        self.extra_large = False  # extra_large_param_to_reduce
        self.ready_for_gradients = False
        self.grads_in_partition: Tensor | None = None
        self.previous_reduced: list[ParameterSpec] = []  # previous_reduced_grads
        self.accumulated: list[Tensor] | None = None  # all_grad_tensors
        self.averaged: list[Tensor] = []  # averaged_gradients
        self.global_norm: Tensor | None = None  # _global_grad_norm

    @property
    def parameter_itemsize(self) -> int:
        return self.compute_itemsize

    @property
    def master_itemsize(self) -> int:
        """bf16_master_weights_and_grads with bf16_optimizer_states: two bytes in bf16_pure, else fp32."""
        return self.compute_itemsize if self.cfg.precision.kind is Precision.BF16_PURE else FP32

    @property
    def autocast(self) -> bool:
        return False  # the module itself is in half precision

    def ranks(self) -> list[int]:
        """Partitions have one size, gradients kept for them have not: the worst in backward, after it, in the step."""
        backward = self.group.early_and_large(self.partition_gradients or self.overlap, self._kept_numel)
        return sorted({*backward, *(max(range(self.world), key=f) for f in (self._end_numel, self._step_bytes))})

    def _end_numel(self, rank: int) -> int:
        """grads_in_partition, in elements."""
        return sum(s.numel for s in self.group.members(rank))

    def _kept_numel(self, rank: int) -> int:
        """Elements of gradients before a rank's backward ends: grads_in_partition, and in stage 1 also gradients

        that were too large for the bucket, whoever owns them.
        """
        members = self.group.members(rank)
        large = [] if self.partition_gradients else [s for s in self.specs if s.numel > self.bucket_size]
        return sum(s.numel for s in {*members, *large})

    # -- build -----------------------------------------------------------------------------------

    def build(self) -> None:
        """Parameters one by one in fp32, cast, flattened, then dropped; a clone of the partition, cast likewise."""
        originals = [self._materialise(s) for s in self.specs]
        self.tape.trace.empty_cache()
        self.flatten(originals)

    def _materialise(self, spec: ParameterSpec) -> Tensor:
        """The lab draws every parameter in fp32 and casts it (parallel/materialise.py)."""
        drawn = self.tape.new(spec.numel, FP32, spec.name, PARAMETERS)
        size = self.parameter_itemsize
        return drawn if size == FP32 else self.tape.new(spec.numel, size, spec.name, PARAMETERS)

    def flatten(self, originals: list[Tensor]) -> None:
        """DeepSpeedZeroOptimizer.__init__; empties ``originals``, whose storage the flat group replaces."""
        new, size, master, numel = self.tape.new, self.parameter_itemsize, self.master_itemsize, self.partition
        self.flat = new(self.group.numel, size, "flat parameters", PARAMETERS)
        while originals:
            originals.pop(0)
        for spec in self.specs:
            self.add_parameter(spec, self.flat.view(spec.numel))
        self.master = new(numel, size, "clone of the partition", MASTER)
        if size != master:
            self.master = new(numel, master, "master weights", MASTER)
        new(numel, master, "gradient of initialize_optimizer_states", GRADIENTS)
        self.members = self.group.members(self.rank)
        self.member_names = {s.name for s in self.members}

    # -- backward --------------------------------------------------------------------------------

    def grad_ready(self, spec: ParameterSpec, parameter: Parameter) -> None:
        """process_gradients, the hook on every parameter."""
        if not (self.partition_gradients or self.overlap or self.contiguous):
            return  # create_gradient_handling_hooks was not called
        self._setup_buckets()
        if self.partition_gradients or (self.overlap and self.last_micro_step):
            self._add_to_bucket(spec)

    def _setup_buckets(self) -> None:
        if self.contiguous and not self.ready_for_gradients:
            self.bucket.index = 0
            for _ in range(2 if self.overlap else 1):
                self.bucket.buffers.append(
                    self.tape.new(self.bucket_size, self.parameter_itemsize, "ZeRO reduce bucket", COMM)
                )
        self.ready_for_gradients = True

    def _add_to_bucket(self, spec: ParameterSpec) -> None:
        """reduce_independent_p_g_buckets_and_remove_grads."""
        bucket, accumulator = self.bucket, self.parameters[spec.name].accumulator
        if bucket.numel + spec.numel > self.bucket_size:
            self._reduce()
            if self.contiguous and self.overlap:
                bucket.index = 1 - bucket.index
        if self.contiguous:
            if spec.numel > self.bucket_size:
                self.extra_large = True
            else:
                accumulator.grad = bucket.buffers[bucket.index].view(spec.numel)
        assert accumulator.grad is not None
        bucket.params.append(spec)
        bucket.grads.append(accumulator.grad.view())
        bucket.numel += spec.numel

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
            own = spec.name in self.member_names
            if own and self.contiguous:
                self._copy_to_partition(spec)
            elif not own and self.partition_gradients:
                if self.overlap and not self.contiguous:
                    self.previous_reduced.append(spec)
                else:
                    self.parameters[spec.name].accumulator.grad = None
        self.tape.trace.stream = 0
        self.extra_large = False
        bucket.clear()

    def _flatten(self, slices: list[int]) -> None:
        """allreduce_bucket: a flat copy, reduced and copied back; a single slice is reduced where it is."""
        if len(slices) > 1:
            self.tape.new(sum(slices), self.parameter_itemsize, "flattened bucket", COMM)

    def _drop_previous_reduced(self) -> None:
        for spec in self.previous_reduced:
            self.parameters[spec.name].accumulator.grad = None
        self.previous_reduced = []

    def _copy_to_partition(self, spec: ParameterSpec) -> None:
        """copy_grads_in_partition: the first own gradient makes room for all of them."""
        if self.grads_in_partition is None:
            numel = sum(s.numel for s in self.members)
            self.grads_in_partition = self.tape.new(numel, self.parameter_itemsize, "grads_in_partition", GRADIENTS)
        self.parameters[spec.name].accumulator.grad = self.grads_in_partition.view(spec.numel)

    def finish_backward(self) -> None:
        """engine.allreduce_gradients: stage 2 after every micro-step, stage 1 after the last."""
        if not self.partition_gradients:
            if not self.last_micro_step:
                return
            if not self.overlap:  # reduce_gradients
                for spec in self.specs:
                    self._add_to_bucket(spec)
        self._reduce()
        self._drop_previous_reduced()
        gradients = [self.parameters[s.name].accumulator.grad for s in self.members]
        if self.accumulated is None:
            self.accumulated = [g.view() for g in gradients if g is not None]
        gradients.clear()  # later micro-steps are added in place
        if self.last_micro_step:
            self.averaged, self.accumulated = self.accumulated, None
            padding = self.partition - sum(self.group.slices(self.rank))
            if padding:
                self.averaged.append(self.tape.new(padding, self.parameter_itemsize, "partition padding", GRADIENTS))
        if self.contiguous:  # _release_ipg_buffers
            self.bucket.buffers.clear()
            self.grads_in_partition = None
        self.ready_for_gradients = False
        self.zero_grad()

    # -- optimizer step --------------------------------------------------------------------------

    def _step_bytes(self, rank: int) -> int:
        """What the optimizer step of one rank needs beyond the states, to compare ranks."""
        pieces, size = self.group.slices(rank), self.parameter_itemsize
        cast = self.master_itemsize if self.master_itemsize != size else 0
        flattened = self.partition * ((size if len(pieces) > 1 else 0) + cast)
        return size * self._end_numel(rank) + max(FP64 * max(pieces, default=0), flattened) + FP64 * len(pieces)

    def optimizer_step(self) -> None:
        """DeepSpeedZeroOptimizer.step: gradient norm in fp64, flat gradients in the masters' type, the update."""
        new, size, numel = self.tape.new, self.parameter_itemsize, self.partition
        norms: list[Tensor] = []
        for part in self.group.slices(self.rank):  # get_grad_norm_direct; without clipping, too
            wide = new(part, FP64, "gradient slice, fp64")
            norms.append(new(1, FP64, "gradient norm"))
            del wide
        norms.clear()
        total = new(1, FP32, "total norm")
        previous = self.global_norm  # the engine's copy of the last step's, until this step is over
        self.global_norm = new(1, FP32, "global gradient norm")
        # Flattening copies unless the partition is one piece; the cast copies unless the types agree.
        flat = self.averaged[0] if len(self.averaged) == 1 else new(numel, size, "flat gradient partition", GRADIENTS)
        if self.master_itemsize != size:
            flat = new(numel, self.master_itemsize, "gradient in the masters' type", GRADIENTS)
        self.averaged = []
        self.optimizer.step(self.optimizer_parameters())
        del flat, total, previous

    def optimizer_parameters(self) -> list[tuple[int, int]]:
        """The optimizer sees one tensor: this rank's master partition."""
        return [(self.partition, self.master_itemsize)]


class Zero1(ZeroRule):
    """Stage 1: gradients stay whole until the last micro-step's backward is done, then every one is reduced."""


class Zero2(ZeroRule):
    """Stage 2: every gradient goes into the bucket as it is made, and each micro-step keeps one partition's."""

    partition_gradients = True
