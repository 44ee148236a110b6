"""What every strategy's rule has in common: parameters, the optimizer, and where engines hook in."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property, partial

from lab.analytic.accumulator import Accumulator
from lab.analytic.architecture import ParameterSpec, by_unit
from lab.analytic.dora import MAGNITUDE
from lab.analytic.gradients import let_go
from lab.analytic.layer_instructions import Hook, Pass
from lab.analytic.make_optimizer import make_optimizer
from lab.analytic.ops import Parameter, Quantized
from lab.analytic.optimizers import Shape, clip_gradients
from lab.analytic.quantization import Quantizer, compute_itemsize
from lab.analytic.reduce import column_partials
from lab.analytic.segments import Repeated
from lab.analytic.tape import BF16, FP32, Event, Storage, Tape, Tensor, Trace
from lab.config import RunConfig
from lab.vocab import MemoryCategory, Precision

PARAMETERS = MemoryCategory.PARAMETERS
KEPT, PASSED_ON = "kept", "passed on"


class Rule:
    """One strategy's memory: made once, then driven through steps. This base is one process without sharding.

    ``steady_step`` is the first step (0-based) from which steps repeat, the allocator's cached segments included;
    ``repeats_from`` the first whose allocations and frees are those of every later one.
    """

    steady_step = 2
    repeats_from = 1
    deepspeed = False  # its engine always divides the loss by the micro-steps and multiplies it by the loss scale
    partial_norms = False  # a rank has norms of shards, which clipping sums over ranks
    always_divides_loss = False  # Accelerate's backward divides by the micro-steps even where there is one
    module_hooks = False  # ``enter`` and ``leave`` do something inside blocks too: the four functions below, and a node
    linear_keeps_parameter = False  # DeepSpeed's LinearFunctionForZeroStage3, see Ops.linear

    def __init__(self, cfg: RunConfig, tape: Tape, specs: list[ParameterSpec]) -> None:
        self.cfg, self.tape, self.specs = cfg, tape, specs
        self.trained = [s for s in specs if s.trainable]
        self.spec_of = {s.name: s for s in specs}
        self.unit_specs = by_unit(specs)
        self.told = type(self).grad_ready is not Rule.grad_ready  # of gradients
        self.quantizer = Quantizer(tape, cfg.quantization, cfg.hardware.num_streaming_multiprocessors)
        self.world = cfg.world_size
        self.half = cfg.precision.kind is not Precision.FP32
        self.optimizer = make_optimizer(tape, cfg)
        self.parameters: dict[str, Parameter] = {}
        self.last_micro_step = True
        self.rank = 0  # the one that is replayed
        self.further_ranks: Sequence[int] = ()  # replayed together with it

    def ranks(self) -> list[int]:
        """Ranks among which the worst is, for every phase: all that has to be replayed."""
        return [0]

    def replays(self) -> list[list[int]]:
        """``ranks()``, those together that one replay serves."""
        return [[rank] for rank in self.ranks()]

    def events_of(self, rank: int) -> list[Event]:
        """What one of the ranks that are replayed has done."""
        return self.tape.trace.events

    # -- sizes ---------------------------------------------------------------------------------

    @cached_property
    def parameter_itemsize(self) -> int:
        """Bytes per element of the stored parameters."""
        return BF16 if self.cfg.precision.kind is Precision.BF16_PURE else FP32

    def itemsize_of(self, spec: ParameterSpec) -> int:
        """Bytes per element of one stored parameter that is not quantized."""
        return FP32 if spec.wide else self.parameter_itemsize

    @cached_property
    def compute_itemsize(self) -> int:
        """Bytes per element of matmul operands."""
        return BF16 if self.half else FP32

    @property
    def autocast(self) -> bool:
        """Does the forward run under torch.autocast?"""
        return self.cfg.precision.kind in (Precision.BF16_MIXED, Precision.FP16_MIXED)

    # -- life of a run -------------------------------------------------------------------------

    def build(self) -> None:
        """One parameter after the other; blocks of one kind do the same."""
        trace, kinds = self.tape.trace, dict[Hashable, Repeated]()
        for_good = Storage(trace, 0, PARAMETERS, "")  # nobody asks where a parameter's bytes are
        for block, specs, kind in self.unit_specs:
            if self.draws_only(specs):
                if kind not in kinds:
                    kinds[kind] = Repeated(trace, partial(self.draw_for_good, specs), block)
                kinds[kind].play(trace, block)
                for spec in specs:
                    self.add_parameter(spec, Tensor(for_good, spec.numel, self.itemsize_of(spec)))
                continue
            for spec in specs:
                tensor, quantized = self.materialise(spec)
                self.add_parameter(spec, tensor, quantized)
                del tensor

    def draws_only(self, specs: Sequence[ParameterSpec]) -> bool:
        """Is ``draw`` all that materialising these parameters takes?"""
        return not any(s.quantized or MAGNITUDE in s.name for s in specs)

    def draw(self, spec: ParameterSpec, trace: Trace) -> Event:
        """parallel/materialise.py: drawn in fp32, then cast."""
        drawn = trace.allocate(spec.numel * FP32, PARAMETERS, spec.name)
        size = self.itemsize_of(spec)
        if size != FP32:
            cast = trace.allocate(spec.numel * size, PARAMETERS, spec.name)
            trace.free(drawn)
            drawn = cast
        return drawn

    def draw_for_good(self, specs: Sequence[ParameterSpec], trace: Trace) -> list[Event]:
        """``draw`` of each; nothing is given back."""
        for spec in specs:
            self.draw(spec, trace)
        return []

    def materialise(self, spec: ParameterSpec) -> tuple[Tensor, Quantized | None]:
        """``draw``; a weight to be quantized is cast to the compute dtype."""
        size = compute_itemsize(self.cfg.quantization) if spec.quantized else self.itemsize_of(spec)
        base = self._dora_base(spec)
        drawn = self.tape.new(base.numel, FP32, f"DoRA base of {base.name}") if base else None
        tensor = self.tape.new(spec.numel, FP32, spec.name, PARAMETERS)
        if base and base.transposed and self.tape.trace.on_device_kernels:  # norms of a Conv1D's columns
            rows, columns = base.shape
            partials = column_partials(rows, columns, self.cfg.hardware.num_streaming_multiprocessors)
            held = [self.tape.new(n, 1, "partial norms") for n in partials]
            del held
        del drawn
        if size != FP32:
            tensor = self.tape.new(spec.numel, size, spec.name, PARAMETERS)
        return self.quantizer.store(spec, tensor) if spec.quantized else (tensor, None)

    def _dora_base(self, spec: ParameterSpec) -> ParameterSpec | None:
        """DoRA's magnitudes start as norms of the base, which is drawn again for them."""
        target, magnitude, _ = spec.name.partition(MAGNITUDE)
        if not magnitude or self.cfg.adapter.load is not None:
            return None
        return next(s for s in self.specs if s.name == f"{target}.weight")

    def add_parameter(self, spec: ParameterSpec, tensor: Tensor, quantized: Quantized | None = None) -> Parameter:
        accumulator = Accumulator(spec.name)
        parameter = Parameter(spec.name, spec.shape, tensor, accumulator, spec.trainable, quantized)
        if self.told:
            accumulator.on_grad = self._arrived
        self.parameters[spec.name] = parameter
        return parameter

    def _arrived(self, name: str) -> None:
        self.grad_ready(self.spec_of[name], self.parameters[name])

    @cached_property
    def trained_accumulators(self) -> list[Accumulator]:
        """Of what is trained, in the model's order; once all is built."""
        return [p.accumulator for p in self.parameters.values() if p.trainable]

    def start_step(self) -> None: ...

    def end_backward(self) -> None:
        """Inside backward, when the graph has run: queue_callback's."""

    def finish_backward(self) -> None:
        """When backward has returned."""

    def optimizer_step(self) -> None:
        norm: Tensor | None = None
        if self.cfg.train.max_grad_norm is not None:
            norm = clip_gradients(self.tape, self.optimizer_parameters(), self.partial_norms)
        del norm
        self.optimizer.step(self.optimizer_parameters(), self.optimizer_shapes())

    def stepped(self) -> list[ParameterSpec]:
        """What is trained, in the order in which the optimizer comes to it."""
        return self.trained

    def optimizer_parameters(self) -> list[tuple[int, int]]:
        """(elements, element size) of what the optimizer sees, in order."""
        return [(s.numel, self.itemsize_of(s)) for s in self.trained]

    def optimizer_shapes(self) -> list[Shape] | None:
        """Their shapes; None: flat."""
        return [s.shape for s in self.trained]

    def zero_grad(self) -> None:
        let_go(self.trained_accumulators)

    # -- hooks around modules: nothing to do without sharding ------------------------------------

    def pre_forward(self, unit: int) -> None: ...

    def post_forward(self, unit: int, out: Tensor) -> Tensor:
        return out

    def wrap_input(self, unit: int, x: Tensor) -> Tensor:
        return x

    def enter_source(self, module: str) -> None: ...

    def enter(self, module: str, x: Tensor) -> Tensor:
        return x

    def leave(self, module: str, y: Tensor) -> Tensor:
        return y

    def leaf(self, module: str, y: Tensor) -> Tensor:
        """transformers has made the module's output a leaf before this strategy's hooks on it ran."""
        return y

    # -- what ``enter`` and ``leave`` do, and their nodes in backward, where there are ``module_hooks`` ----------

    def before_forward(self, module: str, differentiable: bool) -> None:
        """``differentiable``: the input needs a gradient, so ``after_backward`` will come."""

    def after_forward(self, module: str) -> None: ...

    def before_backward(self, module: str) -> None: ...

    def after_backward(self, module: str) -> None: ...

    def hooks_repeat(self, block: int) -> bool:
        """Will the hooks inside the block do to memory what they do inside any other block like it of which this holds?

        It has to hold before and after the pass, forward or backward.
        """
        return False

    def count_hooks(self, block: str, hooks: Sequence[Hook | Pass]) -> None:
        """What hooks inside a block's pass keep account of, in order; what they do to memory has been replayed."""
        raise NotImplementedError

    # -- gradients -------------------------------------------------------------------------------

    def quiet_gradients(self, block: int) -> str | None:
        """What ``grad_ready`` does to the block's gradients, if it is the same for each and nothing to other memory.

        KEPT: nothing; PASSED_ON: each is given up at once. None: something else, or not always.
        """
        return KEPT

    def loud_gradient(self, parameters: Sequence[Parameter]) -> int | None:
        """Where gradients come in this order and ``quiet_gradients`` is None: the only one that is not PASSED_ON."""
        return None

    def grad_ready(self, spec: ParameterSpec, parameter: Parameter) -> None: ...

    def grads_ready(self, parameters: Sequence[Parameter]) -> None:
        """``grad_ready`` of each, where it is quiet (``quiet_gradients``); PASSED_ON ones may be gone by then."""
        for parameter in parameters:
            self.grad_ready(self.spec_of[parameter.name], parameter)


class DeepSpeedRule(Rule):
    """What ZeRO's stages share: the module itself is in half precision, the optimizer has a master copy."""

    deepspeed = True

    @cached_property
    def parameter_itemsize(self) -> int:
        return self.compute_itemsize

    def itemsize_of(self, spec: ParameterSpec) -> int:
        """DeepSpeed casts every floating-point parameter of the module, adapters too."""
        return self.parameter_itemsize

    @property
    def master_itemsize(self) -> int:
        """bf16_master_weights_and_grads with bf16_optimizer_states: two bytes in bf16_pure, else fp32."""
        return self.compute_itemsize if self.cfg.precision.kind is Precision.BF16_PURE else FP32

    @property
    def autocast(self) -> bool:
        return False
