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
ipg_buckets[].buffer                 e * reduce_bucket_size; two with overlap_comm   from a backward's first
                                                                                     gradient to its last reduction
allreduce_bucket's flattened copy    e * what is reduced at once                     during each reduction
grads_in_partition                   e * whole size of the parameters that overlap   first own gradient reduced
                                     the rank's partition                            until the step
get_norm_dtype copy                  8 * a gradient slice, one at a time (fp64)      gradient norm
flat_grad_partition                  e * P                                           until cast
single_grad_partition                m * P                                           optimizer step
===================================  ==============================================  ===========================

``allgather_bucket_size`` sizes nothing here: the updated partitions are gathered straight into the flat group.
Left out: scalars and partial sums that live for one kernel (up to some KiB in the step); fp16 steps skipped for an
overflow (no state is made in them); with overlap_comm, how long the allocator holds back blocks that the other stream
has used (``record_stream``), which only *reserved* sees.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

from lab.analytic.architecture import ParameterSpec
from lab.analytic.ops import Parameter
from lab.analytic.segments import Played, Repeated
from lab.analytic.sharding.base import DeepSpeedRule
from lab.analytic.sharding.zero_partitions import FlatGroup
from lab.analytic.sharding.zero_ranks import FP64, Partition, RankTrace
from lab.analytic.sharding.zero_reduction import Reducer, ranks_differ
from lab.analytic.tape import FP32, Event, Tape, Tensor, Trace
from lab.config import RunConfig
from lab.vocab import MemoryCategory

PARAMETERS, MASTER = MemoryCategory.PARAMETERS, MemoryCategory.MASTER_WEIGHTS
GRADIENTS = MemoryCategory.GRADIENTS


class ZeroRule(DeepSpeedRule):
    """What stages 1 and 2 share (DeepSpeedZeroOptimizer)."""

    partition_gradients = False  # stage 2

    def __init__(self, cfg: RunConfig, tape: Tape, specs: list[ParameterSpec]) -> None:
        super().__init__(cfg, tape, specs)
        self.options = cfg.parallel.zero
        self.group = FlatGroup(self.trained, self.world, self.options.round_robin_gradients)
        self.partition = self.group.partition_numel
        self.trained_numel = [0] * cfg.model.num_layers  # of the blocks
        for spec in self.trained:
            if spec.unit >= 0:
                self.trained_numel[spec.unit] += spec.numel
        self.oversized = [s for s in self.trained if s.numel > self.options.reduce_bucket_size]
        self.global_norm: Tensor | None = None  # _global_grad_norm
        self.alone: dict[int, RankTrace] = {}  # what each rank does alone, where several are replayed together

    def ranks(self) -> list[int]:
        """Partitions have one size, gradients kept for them have not: the worst in backward, after it, in the step."""
        backward = self.group.early_and_large(
            self.partition_gradients or bool(self.options.overlap_comm), self._kept_numel
        )
        return sorted({*backward, *(max(range(self.world), key=f) for f in (self._end_numel, self._step_bytes))})

    def replays(self) -> list[list[int]]:
        if ranks_differ(self.options, self.partition_gradients, bool(self.oversized)):
            return super().replays()
        return [self.ranks()]

    def events_of(self, rank: int) -> list[Event]:
        return self.alone[rank].whole() if self.alone else super().events_of(rank)

    def _end_numel(self, rank: int) -> int:
        """grads_in_partition, in elements."""
        return sum([s.numel for s in self.group.members(rank)])

    def _kept_numel(self, rank: int) -> int:
        """Elements of gradients before a rank's backward ends: grads_in_partition, in stage 1 also oversized ones.

        Gradients too large for the bucket stay where they are in stage 1, whoever owns them.
        """
        kept = self._end_numel(rank)
        if not self.partition_gradients and self.oversized:
            own = {s.name for s in self.group.members(rank)}
            kept += sum(s.numel for s in self.oversized if s.name not in own)
        return kept

    # -- build -----------------------------------------------------------------------------------

    def build(self) -> None:
        """Parameters one by one in fp32, cast, flattened, then dropped; a clone of the partition, cast likewise."""
        originals: list[Tensor | Played] = []
        kinds: dict[Hashable, Repeated] = {}
        for block, specs, kind in self.unit_specs:
            if self.draws_only(specs) and all(s.trainable for s in specs):
                if kind not in kinds:
                    kinds[kind] = Repeated(self.tape.trace, partial(self._draw_all, specs), block)
                originals.append(kinds[kind].play(self.tape.trace, block))
                continue
            for spec in specs:
                tensor, quantized = self.materialise(spec)
                if spec.trainable:
                    originals.append(tensor)
                else:  # no optimizer knows it: it stays as it is
                    self.add_parameter(spec, tensor, quantized)
                del tensor
        self.tape.trace.empty_cache()
        self.flatten(originals)

    def _draw_all(self, specs: Sequence[ParameterSpec], trace: Trace) -> list[Event]:
        return [self.draw(spec, trace) for spec in specs][::-1]  # flattened, they go from the first to the last

    def flatten(self, originals: list[Tensor | Played]) -> None:
        """DeepSpeedZeroOptimizer.__init__; empties ``originals``, whose storage the flat group replaces."""
        new, size, master, numel = self.tape.new, self.parameter_itemsize, self.master_itemsize, self.partition
        self.flat = new(self.group.numel, size, "flat parameters", PARAMETERS)
        while originals:
            original = originals.pop(0)
            if isinstance(original, Played):
                original.give_back(self.tape.trace)
            del original
        for spec in self.trained:
            self.add_parameter(spec, self.flat.view(spec.numel))
        self.parameters = {s.name: self.parameters[s.name] for s in self.specs}  # in the model's order
        self.master = new(numel, size, "clone of the partition", MASTER)
        if size != master:
            self.master = new(numel, master, "master weights", MASTER)
        new(numel, master, "gradient of initialize_optimizer_states", GRADIENTS)
        if self.further_ranks:
            self.alone = {rank: RankTrace(self.tape.trace) for rank in (self.rank, *self.further_ranks)}
        tapes = {rank: Tape(trace) for rank, trace in self.alone.items()} or {self.rank: self.tape}
        self.partitions = [Partition(tape, self.group, rank, size) for rank, tape in tapes.items()]
        self.reducer = Reducer(self.tape, self.options, self.group, self.partitions, self.partition_gradients, size)
        self.reducer.parameters = self.parameters

    # -- backward --------------------------------------------------------------------------------

    def quiet_gradients(self, block: int) -> str | None:
        return self.reducer.quiet(self.trained_numel[block], self.last_micro_step)

    def grad_ready(self, spec: ParameterSpec, parameter: Parameter) -> None:
        self.reducer.grad_ready(spec, self.last_micro_step)

    def loud_gradient(self, parameters: Sequence[Parameter]) -> int | None:
        return self.reducer.loud([p.numel for p in parameters], self.last_micro_step)

    def grads_ready(self, parameters: Sequence[Parameter]) -> None:
        self.reducer.grads_ready([self.spec_of[p.name] for p in parameters], self.last_micro_step)

    def finish_backward(self) -> None:
        self.reducer.finish_backward(self.trained, self.last_micro_step)

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
        for partition in self.partitions:
            partition.norms.play(partition.tape.trace)
        total = new(1, FP32, "total norm")
        previous = self.global_norm  # the engine's copy of the last step's, until this step is over
        self.global_norm = new(1, FP32, "global gradient norm")
        flat = [partition.flattened() for partition in self.partitions]
        if self.master_itemsize != size:  # the cast copies unless the types agree
            cast = new(numel, self.master_itemsize, "gradient in the masters' type", GRADIENTS)
            flat = [cast]
            del cast
        for partition in self.partitions:
            partition.averaged.clear()
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
