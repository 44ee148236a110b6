"""FSDP2 (``fully_shard``): one unit per block, one root unit with embedding, final norm and head.

Source: torch/distributed/fsdp/_fully_shard (2.11 and 2.13): _fsdp_param_group.py (when), _fsdp_collectives.py
(which buffers), _fsdp_state.py (root, hooks). Per unit and all-gather: in mixed precision a flat cast of the
local shards (gone when the collective is issued), one flat output of all shards, then one storage per parameter,
padded to the world size. In forward the flat output stays until the next unit's copy-out; in backward it goes at
once, and the next unit's all-gather is already under way (prefetch of one). Gradients are flattened into one
reduce-scatter input per unit, which stays until the next unit's; its output is the sharded gradient itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial

from lab.analytic.architecture import ParameterSpec
from lab.analytic.gradients import let_go_of_list
from lab.analytic.ops import Parameter, Quantized
from lab.analytic.quantization import packed_shape
from lab.analytic.segments import Pairs, Repeated, Together
from lab.analytic.sharding.base import Rule
from lab.analytic.sharding.fsdp_init import Initialised
from lab.analytic.tape import FP32, INT64, Event, Grads, Node, Storage, Tape, Tensor, Trace
from lab.config import RunConfig
from lab.vocab import MemoryCategory, Precision, Strategy

GATHERED = MemoryCategory.GATHERED_PARAMETERS
COMM = MemoryCategory.COMM_BUFFERS
CHUNK_CAT_BLOCK = 128 * 16  # bytes that one block of threads copies; cuda/TensorShape.cu, BYTES_PER_BLOCK
COPY_IN_STREAM, REDUCE_STREAM, ALL_REDUCE_STREAM = 1, 2, 3  # FSDPCommContext's: the allocator keeps a pool for each


def shard_rows(rows: int, size: int, rank: int) -> int:
    """Rows of dim 0 that a rank holds under torch.chunk."""
    chunk = -(-rows // size)
    return max(min(chunk, rows - chunk * rank), 0)


@dataclass
class Unit:
    """One FSDP parameter group."""

    index: int
    members: list[tuple[ParameterSpec, Parameter]] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)  # the members', gathered, whatever they are given since
    shard_bytes: int = 0  # this rank's padded shards, as they are gathered
    cast_numel: int = 0  # of these, what mixed precision casts first
    trained_numel: int = 0  # of these, what has gradients
    stored_size: int = 0  # bytes per element of the widest of those, as they are stored
    all_gather: Tensor | None = None  # result of an all-gather that nobody has waited for
    gathered: bool = False
    reduced: bool = False  # post_backward has run
    whole: Together | None = None  # the members' storages
    sharded_grad: Tensor | None = None  # reduce-scatter output; the parameters' gradients are views of it


class FSDP(Rule):
    """`fsdp`, `fsdp_grad_op`, `hsdp`. Rank 0 holds the largest shard of every parameter and is the worst rank."""

    def __init__(self, cfg: RunConfig, tape: Tape, specs: list[ParameterSpec]) -> None:
        super().__init__(cfg, tape, specs)
        self.size = cfg.fsdp_shard_size
        self.partial_norms = self.size > 1
        self.mixed = cfg.precision.kind in (Precision.BF16_MIXED, Precision.FP16_MIXED)
        self.reshard = cfg.parallel.strategy is not Strategy.FSDP_GRAD_OP
        self.units = {i: Unit(i) for i in (-1, *range(cfg.model.num_layers))}
        self.order: list[int] = []  # units in the order of their post-forward
        self.previous: Tensor | None = None  # forward: the last all-gather's flat output
        self.reduce_input: Tensor | None = None  # backward: the last reduce-scatter's input
        self.kept: list[Tensor] = []
        self.replicates = cfg.parallel.strategy is Strategy.HSDP
        self.all_reduced: list[Tensor] = []  # backward: every unit's AllReduceState holds what was summed over replicas
        self.kinds: Pairs = {}  # of units
        self.one_by_one = self.size == 1 and self.mixed  # no collective: each parameter is cast into its place

    @property
    def autocast(self) -> bool:
        return False  # FSDP2 casts parameters and inputs itself

    def gathered_size(self, spec: ParameterSpec) -> int:
        """Bytes per element of one gathered parameter: packed ones, and without mixed precision all, as stored."""
        if spec.quantized:
            return packed_shape(spec.numel, self.cfg.quantization)[1]
        return self.compute_itemsize if self.mixed else self.itemsize_of(spec)

    def _padded(self, spec: ParameterSpec) -> int:
        rows, columns = spec.shape[0], spec.numel // spec.shape[0]
        if spec.quantized:  # [elements, 1]
            rows, columns = packed_shape(spec.numel, self.cfg.quantization)[0], 1
        return -(-rows // self.size) * columns

    def _stored_size(self, spec: ParameterSpec) -> int:
        return self.gathered_size(spec) if spec.quantized else self.itemsize_of(spec)

    def build(self) -> None:
        if not self.tape.trace.on_device_kernels:  # DeviceMesh keeps its ranks in an int32 tensor on the CPU
            self.kept.append(self.tape.new(self.world, 4, "device mesh"))
        if self.cfg.quantization.kind != "none":
            self._build_units()
            return
        kinds: dict[Hashable, Repeated] = {}
        for block, specs, kind in self.unit_specs:
            if kind not in kinds:
                kinds[kind] = Repeated(self.tape.trace, partial(self._shards_for_good, specs), block)
            kinds[kind].play(self.tape.trace, block)
            for spec in specs:
                self._add_whole(spec)
        self._initialise()

    def _shards_for_good(self, specs: Iterable[ParameterSpec], trace: Trace) -> list[Event]:
        """This rank's padded shards of parameters."""
        for spec in specs:
            trace.allocate(self._padded(spec) * self._stored_size(spec), MemoryCategory.PARAMETERS, spec.name)
        return []

    def _build_units(self) -> None:
        """parallel/fsdp.py, _shard: one whole unit at a time, quantized, then cut; fully_shard's list holds the whole
        parameters until it returns (_fsdp_param.py, _init_sharded_param)."""
        for index in (*range(self.cfg.model.num_layers), -1):
            members = [s for s in self.specs if self.unit_of(s) == index]
            whole = [(s, *self.materialise(s)) for s in members]
            for spec, _, quantized in whole:
                self.add_shard(spec, quantized)
            whole.clear()
        self.parameters = {s.name: self.parameters[s.name] for s in self.specs}  # in the model's order

    def unit_of(self, spec: ParameterSpec) -> int:
        return spec.unit

    def reshards(self, unit: int) -> bool:
        """Are a unit's parameters freed after its forward?"""
        return unit >= 0 and self.reshard

    def add_shard(self, spec: ParameterSpec, quantized: Quantized | None = None) -> None:
        """This rank's padded shard of a parameter, and the place of the whole one."""
        self._shards_for_good([spec], self.tape.trace)
        self._add_whole(spec, quantized)

    def _add_whole(self, spec: ParameterSpec, quantized: Quantized | None = None) -> None:
        padded, size = self._padded(spec), self.gathered_size(spec)
        numel = packed_shape(spec.numel, self.cfg.quantization)[0] if spec.quantized else spec.numel
        whole = Tensor(_unallocated(self.tape.trace, padded * self.size * size, spec.name), numel, size)
        unit = self.units[self.unit_of(spec)]
        unit.storages.append(whole.storage)
        unit.members.append((spec, self.add_parameter(spec, whole, quantized)))
        unit.shard_bytes += padded * size
        unit.cast_numel += padded if self.mixed and not spec.quantized else 0
        if spec.trainable:
            unit.trained_numel += padded
            unit.stored_size = max(unit.stored_size, self.itemsize_of(spec))

    def _initialise(self) -> None:
        """parallel/fsdp.py, _initialise_shards: each whole parameter is drawn in fp32 (and cast), then cut."""
        if self.cfg.model.tied_head:  # to_empty allocates it again for the second place
            self.tape.new(self._padded(self.specs[0]), self.parameter_itemsize, "head.weight, dropped")
        trace, kinds = self.tape.trace, dict[Hashable, Initialised]()
        left: list[Event] = []
        for block, specs, kind in self.unit_specs:
            if kind not in kinds:
                sizes = [(s.name, s.numel, self._padded(s), self.itemsize_of(s)) for s in specs]
                kinds[kind] = Initialised(trace, sizes, block)
            left = kinds[kind].play(trace, block, left)
        for last in left:
            trace.free(last)

    # -- gather and free ---------------------------------------------------------------------------

    def _issue(self, unit: Unit) -> None:
        """unshard(): start the all-gather unless it runs or the parameters are there."""
        if unit.gathered or unit.all_gather is not None or self.size == 1:
            return
        trace, cast = self.tape.trace, unit.cast_numel
        trace.stream = COPY_IN_STREAM
        flat = trace.allocate(cast * self.compute_itemsize, COMM, "FSDP all-gather input") if cast else None
        unit.all_gather = self.tape.new(unit.shard_bytes * self.size, 1, "FSDP all-gather output", COMM)
        trace.stream = 0
        if flat is not None:
            trace.free(flat)

    def _wait(self, unit: Unit, forward: bool) -> None:
        """wait_for_unshard(): copy the flat output into one storage per parameter."""
        if unit.gathered:
            return
        before = self.previous if forward and unit.all_gather is not None else None  # a local variable: to the end
        if self.one_by_one:
            held: Tensor | None = None  # wait_for_unshard's variable all_gather_input
            for (spec, parameter), storage in zip(unit.members, unit.storages, strict=True):
                cast = not spec.quantized
                held = self.tape.new(parameter.numel, self.compute_itemsize, "FSDP cast", COMM) if cast else None
                storage.resize(True)
            del held
        else:
            self._resize(unit, True)
        unit.gathered = True
        if forward:
            self.previous = unit.all_gather
        unit.all_gather = None
        del before

    def free(self, unit: Unit) -> None:
        self._resize(unit, False)
        unit.gathered = False

    def _resize(self, unit: Unit, live: bool) -> None:
        """The members' storages, together. A 4-bit layer's bias in the compute dtype is not among them: it stays."""
        if live == unit.gathered or not unit.storages:
            return
        if self.one_by_one:
            for storage in unit.storages:
                storage.resize(live)
            return
        if unit.whole is None:
            module = f"blocks.{unit.index}" if unit.index >= 0 else ""
            unit.whole = Together(unit.storages, module, self.kinds)
        unit.whole.resize(live)

    # -- hooks -------------------------------------------------------------------------------------

    def pre_forward(self, unit: int) -> None:
        self._issue(self.units[unit])
        self._wait(self.units[unit], forward=True)

    def wrap_input(self, unit: int, x: Tensor) -> Tensor:
        """RegisterPostBackwardFunction on the block's input: its backward runs when the block's is done."""

        def backward(grads: Grads) -> Grads:
            self.post_backward(self.units[unit])
            return [grads[0]]

        return x if x.node is None else x.view(node=Node(self.tape, [x], backward))

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
        """Free the parameters, flatten the gradients, reduce-scatter, keep the output as the sharded gradient.

        foreach_reduce's loop variable holds the last parameter's whole gradient until it returns.
        """
        unit.reduced = True
        self.free(unit)
        self.reduce_input = None
        if not unit.trained_numel:
            return
        stored = unit.stored_size
        size = FP32 if self.mixed and self.cfg.parallel.fsdp.reduce_dtype == "fp32" else stored
        if self.mixed and self.cfg.parallel.fsdp.reduce_dtype != "fp32":
            size = self.compute_itemsize
        numel = unit.trained_numel * self.size
        self.reduce_input = self.tape.new(numel, size, "FSDP reduce-scatter input", COMM)
        self._chunk_cat(unit, size)
        last = let_go_of_list([p.accumulator for _, p in unit.members if p.trainable], keep_last=self.size > 1)
        self.tape.trace.stream = REDUCE_STREAM
        category = MemoryCategory.GRADIENTS
        output = self.tape.new(unit.trained_numel, size, "FSDP sharded gradient", category)
        if self.size > 1 and not self.tape.trace.on_device_kernels:  # gloo reduces a clone of the input
            self.tape.new(numel, size, "gloo's clone of the reduce-scatter input", COMM)
        if self.replicates:  # finalize_backward lets go of it: until then also what is added to an earlier gradient
            self.all_reduced.append(output)
        if size != stored:
            if self.replicates:  # the cast runs on the stream of the all-reduce
                self.tape.trace.stream = ALL_REDUCE_STREAM
            wide = self.tape.new(unit.trained_numel, stored, "FSDP sharded gradient", category)
            output = wide
            del wide
        self.tape.trace.stream = 0
        if unit.sharded_grad is None:
            unit.sharded_grad = output
        del output, last

    def _chunk_cat(self, unit: Unit, size: int) -> None:
        """torch._chunk_cat fills the input; ``size``: bytes per element of that.

        One kernel, from bf16 to fp32 or without a cast: it reads which block of threads copies which tensor, int64 per
        2 KiB of a rank's padded chunk and six per tensor (cuda/TensorShape.cu, get_chunk_cat_metadata). Else
        (TensorShape.cpp, _pad_chunk) gradients whose rows no rank count divides are padded first, all of them.
        """
        if not self.tape.trace.on_device_kernels:
            return
        trained = [
            (s, shard_rows(s.shape[0], self.size, 0), s.numel // s.shape[0]) for s, _ in unit.members if s.trainable
        ]
        given = self.compute_itemsize if self.mixed else unit.stored_size
        if given != size and self.cfg.precision.kind is Precision.FP16_MIXED:
            uneven = [rows * self.size * columns for s, rows, columns in trained if s.shape[0] % self.size]
            padded = [self.tape.new(numel, given, "padded gradient") for numel in uneven]
            del padded
            return
        blocks = sum(-(-rows * columns * size // CHUNK_CAT_BLOCK) for _, rows, columns in trained)
        self.tape.new(blocks + 6 * len(trained) + 2, INT64, "blocks of chunk_cat")

    def end_backward(self) -> None:
        """_root_post_backward_final_callback: the root's gradients come last, then units whose input needed none."""
        for unit in self.units.values():
            if unit.index < 0 or not unit.reduced:
                self.post_backward(unit)
        for unit in self.units.values():
            unit.reduced = False
        self.reduce_input = None
        self.all_reduced.clear()
        self.order.clear()

    # -- the step ------------------------------------------------------------------------------------

    @cached_property
    def _local_shards(self) -> list[tuple[int, int]]:
        return [
            (shard_rows(s.shape[0], self.size, 0) * (s.numel // s.shape[0]), self.itemsize_of(s)) for s in self.trained
        ]

    def optimizer_parameters(self) -> list[tuple[int, int]]:
        """The local, unpadded shards of rank 0."""
        return self._local_shards

    def zero_grad(self) -> None:
        for index in (*range(self.cfg.model.num_layers), -1):  # the root's goes with the last parameter, the head
            self.units[index].sharded_grad = None


def _unallocated(trace: Trace, nbytes: int, name: str) -> Storage:
    """A parameter's gathered storage before its first all-gather: known, without bytes."""
    storage = Storage(trace, 0, GATHERED, f"gathered {name}")
    storage.live, storage.nbytes = False, nbytes
    return storage
