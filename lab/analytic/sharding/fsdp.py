"""FSDP2 (``fully_shard``): one unit per block, one root unit with embedding, final norm and head.

Source: torch/distributed/fsdp/_fully_shard (2.11 and 2.13): _fsdp_param_group.py (when), _fsdp_collectives.py
(which buffers), _fsdp_state.py (root, hooks). Per unit and all-gather: in mixed precision a flat cast of the
local shards (gone when the collective is issued), one flat output of all shards, then one storage per parameter,
padded to the world size. In forward the flat output stays until the next unit's copy-out; in backward it goes at
once, and the next unit's all-gather is already under way (prefetch of one). Gradients are flattened into one
reduce-scatter input per unit, which stays until the next unit's; its output is the sharded gradient itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lab.analytic.architecture import ParameterSpec
from lab.analytic.ops import Parameter
from lab.analytic.sharding.base import Rule
from lab.analytic.tape import FP32, Grads, Node, Tape, Tensor
from lab.config import RunConfig
from lab.vocab import MemoryCategory, Precision, Strategy

GATHERED = MemoryCategory.GATHERED_PARAMETERS
COMM = MemoryCategory.COMM_BUFFERS
COPY_IN_STREAM, REDUCE_STREAM = 1, 2  # FSDPCommContext's streams: the allocator keeps a pool for each


def shard_rows(rows: int, size: int, rank: int) -> int:
    """Rows of dim 0 that a rank holds under torch.chunk."""
    chunk = -(-rows // size)
    return max(min(chunk, rows - chunk * rank), 0)


@dataclass
class Unit:
    """One FSDP parameter group."""

    index: int
    members: list[tuple[ParameterSpec, Parameter]] = field(default_factory=list)
    padded_shard_numel: int = 0
    all_gather: Tensor | None = None  # result of an all-gather that nobody has waited for
    gathered: bool = False
    sharded_grad: Tensor | None = None  # reduce-scatter output; the parameters' gradients are views of it


class FSDP(Rule):
    """`fsdp`, `fsdp_grad_op`, `hsdp`. Rank 0 holds the largest shard of every parameter and is the worst rank."""

    def __init__(self, cfg: RunConfig, tape: Tape, specs: list[ParameterSpec]) -> None:
        super().__init__(cfg, tape, specs)
        self.size = cfg.fsdp_shard_size
        self.mixed = cfg.precision.kind in (Precision.BF16_MIXED, Precision.FP16_MIXED)
        self.reshard = cfg.parallel.strategy is not Strategy.FSDP_GRAD_OP
        self.units = {i: Unit(i) for i in (-1, *range(cfg.model.num_layers))}
        self.order: list[int] = []  # units in the order of their post-forward
        self.previous: Tensor | None = None  # forward: the last all-gather's flat output
        self.reduce_input: Tensor | None = None  # backward: the last reduce-scatter's input
        self.kept: list[Tensor] = []

    @property
    def autocast(self) -> bool:
        return False  # FSDP2 casts parameters and inputs itself

    @property
    def gathered_itemsize(self) -> int:
        """Bytes per element of gathered parameters: param_dtype in mixed precision, else the stored type."""
        return self.compute_itemsize if self.mixed else self.parameter_itemsize

    def _padded(self, spec: ParameterSpec) -> int:
        rows = spec.shape[0]
        return -(-rows // self.size) * (spec.numel // rows)

    def build(self) -> None:
        if not self.tape.trace.on_device_kernels:  # DeviceMesh keeps its ranks in an int32 tensor on the CPU
            self.kept.append(self.tape.new(self.world, 4, "device mesh"))
        for spec in self.specs:
            self.add_shard(spec)
        self._initialise()

    def unit_of(self, spec: ParameterSpec) -> int:
        return spec.unit

    def reshards(self, unit: int) -> bool:
        """Are a unit's parameters freed after its forward?"""
        return unit >= 0 and self.reshard

    def add_shard(self, spec: ParameterSpec) -> None:
        """This rank's padded shard of a parameter, and the place of the whole one."""
        padded = self._padded(spec)
        self.kept.append(self.tape.new(padded, self.parameter_itemsize, spec.name, MemoryCategory.PARAMETERS))
        whole = Tensor(_Unallocated(self, padded * self.size, spec.name).storage, spec.numel, self.gathered_itemsize)
        unit = self.units[self.unit_of(spec)]
        unit.members.append((spec, self.add_parameter(spec, whole)))
        unit.padded_shard_numel += padded

    def _initialise(self) -> None:
        """parallel/fsdp.py, _initialise_shards: each whole parameter is drawn in fp32 (and cast), then cut."""
        if self.cfg.model.tied_head:  # to_empty allocates it again for the second place
            self.tape.new(self._padded(self.specs[0]), self.parameter_itemsize, "head.weight, dropped")
        value = cut = None
        for spec in self.specs:
            drawn = self.tape.new(spec.numel, FP32, f"initial {spec.name}")
            if self.parameter_itemsize != FP32:
                drawn = self.tape.new(spec.numel, self.parameter_itemsize, f"initial {spec.name}")
            value = drawn
            del drawn
            cut = self.tape.new(self._padded(spec), self.parameter_itemsize, f"initial shard of {spec.name}")
        del value, cut

    # -- gather and free ---------------------------------------------------------------------------

    def _issue(self, unit: Unit) -> None:
        """unshard(): start the all-gather unless it runs or the parameters are there."""
        if unit.gathered or unit.all_gather is not None or self.size == 1:
            return
        size, trace = self.gathered_itemsize, self.tape.trace
        trace.stream = COPY_IN_STREAM
        flat = self.tape.new(unit.padded_shard_numel, size, "FSDP all-gather input", COMM) if self.mixed else None
        unit.all_gather = self.tape.new(unit.padded_shard_numel * self.size, size, "FSDP all-gather output", COMM)
        trace.stream = 0
        del flat

    def _wait(self, unit: Unit, forward: bool) -> None:
        """wait_for_unshard(): copy the flat output into one storage per parameter."""
        if unit.gathered:
            return
        before = self.previous if forward and unit.all_gather is not None else None  # a local variable: to the end
        for _, parameter in unit.members:
            cast = self.size == 1 and self.mixed
            held = self.tape.new(parameter.numel, self.gathered_itemsize, "FSDP cast", COMM) if cast else None
            parameter.tensor.storage.resize(True)
            del held
        unit.gathered = True
        if forward:
            self.previous = unit.all_gather
        unit.all_gather = None
        del before

    def free(self, unit: Unit) -> None:
        for _, parameter in unit.members:
            parameter.tensor.storage.resize(False)
        unit.gathered = False

    # -- hooks -------------------------------------------------------------------------------------

    def pre_forward(self, unit: int) -> None:
        self._issue(self.units[unit])
        self._wait(self.units[unit], forward=True)

    def wrap_input(self, unit: int, x: Tensor) -> Tensor:
        """RegisterPostBackwardFunction on the block's input: its backward runs when the block's is done."""

        def backward(grads: Grads) -> Grads:
            self.post_backward(self.units[unit])
            return [grads[0]]

        return x.view(node=Node(self.tape, [x], backward))

    def post_forward(self, unit: int, out: Tensor) -> Tensor:
        if self.reshards(unit):
            self.free(self.units[unit])
        if unit < 0:
            self.previous = None
        position = len(self.order)
        self.order.append(unit)
        assert out.node is not None
        out.node.hooks = [*(out.node.hooks or []), lambda: self._pre_backward(position)]
        return out

    def _pre_backward(self, position: int) -> None:
        unit = self.units[self.order[position]]
        self._issue(unit)
        self._wait(unit, forward=False)
        if position > 0:
            self._issue(self.units[self.order[position - 1]])

    def post_backward(self, unit: Unit) -> None:
        """Free the parameters, flatten the gradients, reduce-scatter, keep the output as the sharded gradient."""
        grads = [p.accumulator.grad for _, p in unit.members]
        for _, p in unit.members:
            p.accumulator.grad = None
        self.free(unit)
        self.reduce_input = None
        size = FP32 if self.mixed and self.cfg.parallel.fsdp.reduce_dtype == "fp32" else self.gathered_itemsize
        numel = unit.padded_shard_numel * self.size
        self.reduce_input = self.tape.new(numel, size, "FSDP reduce-scatter input", COMM)
        grads.clear()
        self.tape.trace.stream = REDUCE_STREAM
        category = MemoryCategory.GRADIENTS
        output = self.tape.new(unit.padded_shard_numel, size, "FSDP sharded gradient", category)
        if size != self.parameter_itemsize:
            wide = self.tape.new(unit.padded_shard_numel, self.parameter_itemsize, "FSDP sharded gradient", category)
            output = wide
            del wide
        self.tape.trace.stream = 0
        if unit.sharded_grad is None:
            unit.sharded_grad = output
        del output

    def finish_backward(self) -> None:
        """_root_post_backward_final_callback: the root's own gradients come last."""
        self.post_backward(self.units[-1])
        self.reduce_input = None
        self.order.clear()

    # -- the step ------------------------------------------------------------------------------------

    def optimizer_parameters(self) -> list[tuple[int, int]]:
        """The local, unpadded shards of rank 0."""
        size = self.parameter_itemsize
        return [(shard_rows(s.shape[0], self.size, 0) * (s.numel // s.shape[0]), size) for s in self.specs]

    def zero_grad(self) -> None:
        for index in (*range(self.cfg.model.num_layers), -1):  # the root's goes with the last parameter, the head
            self.units[index].sharded_grad = None


class _Unallocated:
    """A parameter's gathered storage before its first all-gather: known, without bytes."""

    def __init__(self, rule: FSDP, numel: int, name: str) -> None:
        nothing = rule.tape.new(0, rule.gathered_itemsize, f"gathered {name}", GATHERED)
        nothing.storage.live = False
        nothing.storage.nbytes = numel * rule.gathered_itemsize
        self.storage = nothing.storage
