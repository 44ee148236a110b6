"""`zero3`: DeepSpeed's ZeRO stage 3 with a client torch optimizer.

Source: DeepSpeed 0.19.8, runtime/zero/stage3.py (class and attribute names below are its own), parameter_offload.py
(hooks), partition_parameters.py (zero.Init) and runtime/engine.py. N = world_size, S = sum over parameters of
ceil(numel / N) (every parameter is padded for itself), S_i the same over sub-group i, e = bytes per parameter element
(2 in half precision, 4 in fp32), m = bytes per master element (2 with bf16_pure, else 4).

===========================  ====================================================  ================================
buffer                       bytes                                                 lives
===========================  ====================================================  ================================
lp_param_buffer              e * S; every shard is a view of it                    always
fp32_partitioned_groups_flat m * S_i per sub-group, a clone where m = e            always
grad_partitions_flat_buffer  e * S                                                 always
ipg_buckets[].buffer         e * reduce_bucket_size, with contiguous_gradients     always; one, whatever overlap_comm
AdamW exp_avg, exp_avg_sq    m * S_i each                                          from the first step on
gathered parameters          see zero3_gather.py, zero3_fetch.py                   persistent ones from step to step
reduced gradients            see zero3_reduce.py                                   each reduction
get_norm_dtype copy          8 * one shard (fp64)                                  gradient norm, one at a time
flat gradient and its cast   e * S_i, and m * S_i where m != e                     one sub-group's step
===========================  ====================================================  ================================

``sub_group_size``: shard elements at which a sub-group closes. ``allgather_bucket_size`` and
``round_robin_gradients`` size nothing in stage 3.

Left out: fp16 steps skipped for an overflow (they make no optimizer state and gather no persistent parameter), and
how long the allocator holds back blocks that another stream has used (``record_stream``): only *reserved* sees that,
where the host runs far ahead of the GPU.
"""

from __future__ import annotations

from lab.analytic.architecture import ParameterSpec
from lab.analytic.ops import Ops, Parameter
from lab.analytic.optimizers import Optimizer
from lab.analytic.reduce import norm_workspace_bytes
from lab.analytic.sharding.base import Rule
from lab.analytic.sharding.zero3_fetch import Coordinator
from lab.analytic.sharding.zero3_gather import Gatherer, Sharded
from lab.analytic.sharding.zero3_reduce import Reducer
from lab.analytic.tape import BOOL, FP32, Grads, Node, Tape, Tensor
from lab.config import RunConfig
from lab.vocab import MemoryCategory, Precision

FP64 = 8  # bytes; zero/utils.py, get_norm_dtype
ALL_GATHER_STREAM = 1  # DeepSpeedZeRoOffload.__allgather_stream, with overlap_comm
PARAMETERS, MASTER = MemoryCategory.PARAMETERS, MemoryCategory.MASTER_WEIGHTS
GRADIENTS = MemoryCategory.GRADIENTS


class Zero3(Rule):
    """Stage 3: every parameter is cut over the ranks, gathered around its modules, its gradient reduce-scattered."""

    deepspeed = True
    linear_keeps_parameter = True

    def __init__(self, cfg: RunConfig, tape: Tape, specs: list[ParameterSpec]) -> None:
        super().__init__(cfg, tape, specs)
        self.options = cfg.parallel.zero
        self.sharded: dict[str, Sharded] = {}
        self.gatherer = Gatherer(tape, self.world, 0 if self.options.overlap_comm is False else ALL_GATHER_STREAM)
        self.grads_remaining: dict[str, int] = {}
        self.global_norm: Tensor | None = None  # _global_grad_norm, of the optimizer and of the engine

    def ranks(self) -> list[int]:
        """All ranks hold the same, padding included; reductions without reduce-scatter take most on the last one."""
        return [self.world - 1]

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

    # -- build -----------------------------------------------------------------------------------

    def build(self) -> None:
        """zero.Init cuts the parameters unit by unit; DeepSpeed then flattens the shards."""
        shards: list[Tensor] = []
        for unit in self.units():
            shards += self._partition_unit(unit)
        self._flatten(shards)
        members: dict[str, list[Sharded]] = {}
        for name, sharded in self.sharded.items():
            members.setdefault(name.rpartition(".")[0], []).append(sharded)
        if self.cfg.model.tied_head:
            members["head"] = members["embedding"]
        self.coordinator = Coordinator(self.gatherer, self.options, members)
        for spec in self.specs:  # create_reduce_and_remove_grad_hooks gathers each for a moment
            self.gatherer.all_gather([self.sharded[spec.name]])
            self.gatherer.partition(self.sharded[spec.name])

    def units(self) -> list[list[ParameterSpec]]:
        """What exists whole at the same time: the lab partitions block by block, then the rest (parallel/zero.py)."""
        return [[s for s in self.specs if s.unit == unit] for unit in (*range(self.cfg.model.num_layers), -1)]

    def _partition_unit(self, specs: list[ParameterSpec]) -> list[Tensor]:
        """materialise draws every parameter in fp32 and casts it; zero.Init cuts one after the other."""
        new, size = self.tape.new, self.parameter_itemsize
        whole: list[Tensor] = []
        for spec in specs:
            drawn = new(spec.numel, FP32, spec.name, PARAMETERS)
            whole.append(drawn if size == FP32 else new(spec.numel, size, spec.name, PARAMETERS))
            del drawn
        shards = []
        for spec in specs:
            shard_numel = -(-spec.numel // self.world)
            shards.append(new(shard_numel, size, f"shard of {spec.name}", PARAMETERS))
            del whole[0]
            parameter = self.add_parameter(spec, Tensor(new(0, size, "").storage, spec.numel, size))
            persist = spec.numel <= self.options.stage3_param_persistence_threshold
            self.sharded[spec.name] = Sharded(parameter, len(self.sharded), shard_numel, persist)
        return shards

    def _flatten(self, shards: list[Tensor]) -> None:
        """DeepSpeedZeroOptimizer_Stage3.__init__; defragment goes through the host and empties ``shards`` first."""
        new, size, master, trace = self.tape.new, self.parameter_itemsize, self.master_itemsize, self.tape.trace
        self.tracker = new(1, BOOL, "inf_or_nan_tracker")
        if trace.on_device_kernels:  # torch 2.11: ProcessGroup.hpp, barrier keeps its tensor in a static variable
            self.barrier = new(1, BOOL, "tensor of the barrier")
        total = sum(s.shard_numel for s in self.sharded.values())
        if trace.on_device_kernels:
            shards.clear()
            trace.empty_cache()
        self.flat = new(total, size, "lp_param_buffer", PARAMETERS)
        shards.clear()
        self.sub_groups = self._make_sub_groups()
        self.optimizers = [Optimizer(self.tape, self.cfg.optimizer) for _ in self.sub_groups]
        self.masters: list[Tensor] = []
        converted: Tensor | None = None  # one sub-group's lives until the next one's is there
        for group in self.sub_groups:
            numel = sum(p.shard_numel for p in group)
            if master != size:
                converted = new(numel, master, "converted shards", MASTER)
            self.masters.append(new(numel, master, "fp32_partitioned_groups_flat", MASTER))
        del converted
        largest = max(sum(p.shard_numel for p in group) for group in self.sub_groups)
        new(largest, master, "gradient of initialize_optimizer_states", GRADIENTS)
        self.reducer = Reducer(self.tape, self.options, self.world, self.rank, size)
        self.grad_partitions = new(total, size, "grad_partitions_flat_buffer", GRADIENTS)

    def _make_sub_groups(self) -> list[list[Sharded]]:
        """_create_fp16_sub_groups: a group closes once it holds ``sub_group_size`` elements."""
        params = [self.sharded[s.name] for s in self.specs]
        groups: list[list[Sharded]] = [[]]
        for p in params:
            if sum(q.shard_numel for q in groups[-1]) >= self.options.sub_group_size:
                groups.append([])
            groups[-1].append(p)
        return groups

    # -- hooks -----------------------------------------------------------------------------------

    def enter_source(self, module: str) -> None:
        if not module:
            self.coordinator.reset_step()
        self.coordinator.fetch(module, forward=True)

    def enter(self, module: str, x: Tensor) -> Tensor:
        """Pre-forward hooks: fetch; PostBackwardFunctionModule on the input releases when its gradient is there."""
        self.coordinator.fetch(module, forward=True)
        self.grads_remaining[module] = 1 if x.node is not None else 0

        def backward(grads: Grads) -> Grads:
            self.grads_remaining[module] -= 1
            if self.grads_remaining[module] == 0:
                self.coordinator.release(module, forward=False)
            return [grads[0]]

        return x if x.node is None else x.view(node=Node(self.tape, [x], backward))

    def leave(self, module: str, y: Tensor) -> Tensor:
        """Forward hooks: release; PreBackwardFunctionForModule on the output fetches before the module's backward."""
        self.coordinator.release(module, forward=True)

        def backward(grads: Grads) -> Grads:
            self.coordinator.fetch(module, forward=False)
            return [grads[0]]

        return y.view(node=Node(self.tape, [y], backward))

    def grad_ready(self, spec: ParameterSpec, parameter: Parameter) -> None:
        self.reducer.add(self.sharded[spec.name])

    def finish_backward(self) -> None:
        """engine._backward_epilogue, after every micro-step."""
        self.reducer.reduce()
        self.coordinator.release_backward_leftovers()

    # -- optimizer step --------------------------------------------------------------------------

    def optimizer_step(self) -> None:
        """DeepSpeedZeroOptimizer_Stage3.step: partition all, norm, one sub-group after the other, gather persistent."""
        new, size, master = self.tape.new, self.parameter_itemsize, self.master_itemsize
        self.coordinator.release_and_reset_all()
        if self.cfg.precision.kind is Precision.FP16_MIXED:
            self._check_overflow()
        norms = self._norms()
        norms.append(new(1, FP64, "total norm"))
        unscaled = new(1, FP64, "global gradient norm")
        for group, optimizer in zip(self.sub_groups, self.optimizers, strict=True):
            numel = sum(p.shard_numel for p in group)
            flat = new(numel, size, "flat gradient", GRADIENTS) if len(group) > 1 else None
            grad = new(numel, master, "gradient in the masters' type", GRADIENTS) if master != size else flat
            del flat
            if self.cfg.train.max_grad_norm is not None:  # unscale_and_clip_grads
                scalars = [new(1, FP64, "clip coefficient") for _ in range(4)]
                del scalars
            optimizer.step([(numel, master)])
            del grad
        self.gatherer.all_gather([self.sharded[s.name] for s in self.specs if self.sharded[s.name].persist])
        self.global_norm = unscaled
        norms.clear()

    def _check_overflow(self) -> None:
        """has_overflow: isinf (its absolute value, then a bool per element), then isnan over all gradient shards."""
        numel = self.grad_partitions.numel
        if self.tape.trace.on_device_kernels:
            absolute = self.tape.new(numel, self.parameter_itemsize, "isinf, absolute value")
            self.tape.new(numel, BOOL, "isinf")
            del absolute
        self.tape.new(numel, BOOL, "isnan")

    def _norms(self) -> list[Tensor]:
        """get_grad_norm_direct per sub-group, with or without clipping: a gradient shard in fp64 at a time."""
        groups: list[Tensor] = []
        for group in self.sub_groups:
            norms: list[Tensor] = []
            for p in group:
                wide = self.tape.new(p.shard_numel, FP64, "gradient shard, fp64")
                norms.append(self.tape.new(1, FP64, "gradient norm"))
                partial = norm_workspace_bytes(p.shard_numel, Ops.num_streaming_multiprocessors)
                if partial and self.tape.trace.on_device_kernels:
                    sums = self.tape.new(partial, 1, "norm, partial sums")
                    self.tape.new(1, FP32, "norm, semaphore")
                    del sums
                del wide
            norms.clear()
            groups.append(self.tape.new(1, FP64, "sub-group norm"))
        return groups
