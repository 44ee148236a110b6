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
how long the allocator holds back blocks that another stream has used (``record_stream``). That depends on how far the
host runs ahead of the GPU, differs between the ranks of one run, and only *reserved* sees it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

from lab.analytic.architecture import ParameterSpec, UnitSpecs, by_unit, tied_modules
from lab.analytic.layer_instructions import Hook, Pass
from lab.analytic.ops import Parameter
from lab.analytic.segments import Played, Repeated
from lab.analytic.sharding.base import KEPT, PASSED_ON, DeepSpeedRule
from lab.analytic.sharding.zero3_fetch import Coordinator
from lab.analytic.sharding.zero3_gather import Gatherer, Sharded
from lab.analytic.sharding.zero3_init import cut
from lab.analytic.sharding.zero3_states import ShardedStates
from lab.analytic.sharding.zero_reduction import only_overflow
from lab.analytic.tape import FREE, IN_USE, MARK, Grads, Node, Tape, Tensor
from lab.config import RunConfig

BASE = ".base_layer"  # peft's name for the module that an adapted one stands around
ALL_GATHER_STREAM = 1  # DeepSpeedZeRoOffload.__allgather_stream, with overlap_comm


class Zero3(DeepSpeedRule):
    """Stage 3: every parameter is cut over the ranks, gathered around its modules, its gradient reduce-scattered."""

    module_hooks = True
    linear_keeps_parameter = True

    def __init__(self, cfg: RunConfig, tape: Tape, specs: list[ParameterSpec]) -> None:
        super().__init__(cfg, tape, specs)
        self.options = cfg.parallel.zero
        self.sharded: dict[str, Sharded] = {}
        self.gatherer = Gatherer(tape, self.world, 0 if self.options.overlap_comm is False else ALL_GATHER_STREAM)
        self.of_unit: list[list[Sharded]] = []  # the blocks', then the root's
        self.trained_numel: list[int] = []  # theirs

    def ranks(self) -> list[int]:
        """All ranks hold the same, padding included; reductions without reduce-scatter take most on the last one."""
        return [self.world - 1]

    # -- build -----------------------------------------------------------------------------------

    def build(self) -> None:
        """zero.Init cuts the parameters unit by unit; DeepSpeed then flattens the shards."""
        shards: list[Played] = []
        kinds: dict[Hashable, Repeated] = {}
        for unit in self.units():
            shards.append(self._partition_unit(unit, kinds))
            self.of_unit.append([self.sharded[spec.name] for spec in unit.specs])
            self.trained_numel.append(sum([spec.numel for spec in unit.specs if spec.trainable]))
        ordered = [self.sharded[spec.name] for spec in self.trained]  # the others keep the shards that zero.Init made
        sizes = self.parameter_itemsize, self.master_itemsize
        self.states = ShardedStates(self.cfg, self.tape, self.rank, ordered, sizes, shards, self.optimizer)
        self.persistent = [p for p in (self.sharded[spec.name] for spec in self.specs) if p.persist]
        members: dict[str, list[Sharded]] = {}
        for name, sharded in self.sharded.items():
            members.setdefault(self._module(name), []).append(sharded)
        if self.cfg.model.tied_head:
            head, embedding = tied_modules(self.cfg.model)
            members[head] = members[embedding]
        self.coordinator = Coordinator(self.gatherer, self.options, members)
        self.modules = self.coordinator.modules
        self.gatherer.visit(ordered)  # create_reduce_and_remove_grad_hooks gathers each for a moment

    def _module(self, name: str) -> str:
        """The module that owns a parameter: around an adapted Linear's own there is peft's, as ``base_layer``."""
        module = name.rpartition(".")[0]
        return f"{module}{BASE}" if f"{module}.lora_A.weight" in self.sharded else module

    def units(self) -> list[UnitSpecs]:
        """What exists whole at the same time: the lab partitions block by block, then the rest (parallel/zero.py)."""
        return by_unit([*(s for s in self.specs if s.unit >= 0), *(s for s in self.specs if s.unit < 0)])

    def _partition_unit(self, unit: UnitSpecs, kinds: dict[Hashable, Repeated]) -> Played:
        """zero.Init cuts one parameter after the other; the shards that it leaves. Units of one kind do the same."""
        specs, trace, size, world = unit.specs, self.tape.trace, self.parameter_itemsize, self.world
        largest_persistent = self.options.stage3_param_persistence_threshold
        block, kind = unit.block, unit.kind
        if kind not in kinds:
            kinds[kind] = Repeated(trace, partial(cut, specs, world, size), block)
        shards = kinds[kind].play(trace, block)
        empty = self.tape.new(0, 1, "").storage
        for spec in specs:
            parameter = self.add_parameter(spec, Tensor(empty, spec.numel, size))
            persist = spec.numel <= largest_persistent
            self.sharded[spec.name] = Sharded(parameter, len(self.sharded), -(-spec.numel // world), persist, block)
        return shards

    # -- hooks -----------------------------------------------------------------------------------

    def enter_source(self, module: str) -> None:
        if not module:
            self.coordinator.reset_step()
        self.coordinator.fetch(self.modules[module], forward=True)

    def enter(self, module: str, x: Tensor) -> Tensor:
        """PostBackwardFunctionModule on the input says when its gradient is there."""
        self.before_forward(module, x.node is not None)

        def backward(grads: Grads) -> Grads:
            self.after_backward(module)
            return [grads[0]]

        return x if x.node is None else x.view(node=Node(self.tape, [x], backward))

    def leave(self, module: str, y: Tensor) -> Tensor:
        """PreBackwardFunctionForModule on the output."""
        self.after_forward(module)
        return self.leaf(module, y)

    def leaf(self, module: str, y: Tensor) -> Tensor:
        """Its hooks come after transformers', so they see an output that needs a gradient."""

        def backward(grads: Grads) -> Grads:
            self.before_backward(module)
            return [grads[0]]

        return y if y.node is None else y.view(node=Node(self.tape, [y], backward))

    def before_forward(self, module: str, differentiable: bool) -> None:
        entered = self.modules[module]
        self.coordinator.fetch(entered, forward=True)
        entered.grads_remaining = 1 if differentiable else 0

    def after_forward(self, module: str) -> None:
        self.coordinator.release(self.modules[module], forward=True)
        if module.endswith(BASE) and (missing := self._read_around(module)):
            self.gatherer.all_gather([missing])

    def _read_around(self, base: str) -> Sharded | None:
        """Then peft's module asks for lora_A.weight's type; the parameter, if it was not its own before."""
        adapted = base.removesuffix(BASE)
        read = self.sharded[f"{adapted}.lora_A.weight"]
        return read if self.coordinator.read_outside(adapted, read) else None

    def before_backward(self, module: str) -> None:
        self.coordinator.fetch(self.modules[module], forward=False)

    def after_backward(self, module: str) -> None:
        left = self.modules[module]
        left.grads_remaining -= 1
        if left.grads_remaining == 0:
            self.coordinator.release(left, forward=False)

    def hooks_repeat(self, block: int) -> bool:
        return self.coordinator.untouched(self.of_unit[block])

    def count_hooks(self, block: str, hooks: Sequence[Hook | Pass]) -> None:
        """In the pass that records the order: what the four functions above do beside gathering and releasing."""
        coordinator, modules = self.coordinator, self.modules
        order, in_backward = coordinator.submodules, coordinator.backward_modules
        for hook in hooks:
            name = block + hook.module
            if isinstance(hook, Pass):
                module = modules[name]
                if not hook.entering:
                    order.append(module)
                    in_backward[module] = None
                else:
                    module.grads_remaining -= 1
                    if not module.grads_remaining:
                        in_backward.pop(module, None)
                        module.recomputed.clear()
            elif hook.entering:
                module = modules[name]
                order.append(module)
                module.grads_remaining = 1 if hook.needs_gradient else 0
            elif name.endswith(BASE):
                self._read_around(name)
        coordinator.step_id = len(order)

    def quiet_gradients(self, block: int) -> str | None:
        reducer = self.states.reducer
        if not reducer.takes(self.trained_numel[block]):
            return None
        return KEPT if reducer.buffer is None else PASSED_ON

    def grad_ready(self, spec: ParameterSpec, parameter: Parameter) -> None:
        self.states.reducer.add(self.sharded[spec.name])

    def loud_gradient(self, parameters: Sequence[Parameter]) -> int | None:
        reducer = self.states.reducer
        if reducer.buffer is None:
            return None
        return only_overflow(reducer.numel, [p.numel for p in parameters], self.options.reduce_bucket_size)

    def grads_ready(self, parameters: Sequence[Parameter]) -> None:
        self.states.reducer.add_quietly([self.sharded[p.name] for p in parameters])

    def finish_backward(self) -> None:
        """engine._backward_epilogue, after every micro-step."""
        self.states.reducer.reduce()
        self.coordinator.release_backward_leftovers()
        if not self.last_micro_step and self.gatherer.stream:
            self._last_gather_is_in_use()

    def _last_gather_is_in_use(self) -> None:
        """Backward releases a trained embedding last, the next forward gathers it first, and nobody waits between.

        The block was used on the compute stream (partition_parameters.py, free_param: record_stream), where its
        gradient is still to be made when the host asks for the next one: that one is another block. After the last
        micro-step the gradient norm is read, so the GPU is done.
        """
        events, embedding = self.tape.trace.events, self.sharded[self.specs[0].name].label
        for i in range(len(events) - 1, -1, -1):
            kind, ident, nbytes, category, label, _ = events[i]
            if kind == FREE and label == embedding:
                events[i] = (FREE, ident, nbytes, category, label, IN_USE)
                return
            if kind == MARK:
                return

    def optimizer_step(self) -> None:
        """DeepSpeedZeroOptimizer_Stage3.step: partition everything, update, gather the persistent parameters."""
        self.coordinator.release_and_reset_all()
        scalars = self.states.step()
        self.gatherer.all_gather(self.persistent)
        self.states.global_norm = scalars.pop()
        scalars.clear()
