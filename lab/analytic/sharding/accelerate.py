"""engine=accelerate: the native rules with what Accelerate 1.15 does otherwise.

Source: accelerate/accelerator.py (backward, accumulate, no_sync, prepare_model), accelerate/utils/fsdp_utils.py
(fsdp2_prepare_model), accelerate/utils/dataclasses.py (set_mixed_precision, DistributedDataParallelKwargs). Autocast
around the model's own forward and ``convert_outputs_to_fp32`` change nothing for a model that returns an fp32 loss,
as the lab's own does and the one around a transformers model (lab.model.hf).
DeepSpeed's stages are the native rules: the same engine runs the same buffers.
"""

from __future__ import annotations

from lab.analytic.architecture import ParameterSpec
from lab.analytic.sharding.base import Rule
from lab.analytic.sharding.carving import Carving
from lab.analytic.sharding.fsdp import FSDP, Unit
from lab.analytic.sharding.replicated import DDP, Single
from lab.analytic.sharding.zero import Zero1, Zero2
from lab.analytic.sharding.zero3 import Zero3
from lab.analytic.tape import FP32, Grads, Node, Tape, Tensor
from lab.config import DDPOptions, RunConfig
from lab.units import MIB
from lab.vocab import MemoryCategory, Strategy

FIRST_BUCKET_BYTES = MIB  # torch: dist._DEFAULT_FIRST_BUCKET_BYTES


class AccelerateSingle(Single):
    """backward: ``loss / gradient_accumulation_steps``, also where that is 1."""

    always_divides_loss = True


class AccelerateDDP(DDP):
    """to_kwargs passes on what differs from DDP's defaults only: at 25 MiB the first bucket is PyTorch's own 1 MiB."""

    always_divides_loss = True

    @property
    def reduces(self) -> bool:
        """Accelerator.no_sync does nothing with one process (accelerator.py, use_distributed)."""
        return super().reduces or self.world == 1

    def bucket_caps(self) -> list[int]:
        caps = super().bucket_caps()
        return [FIRST_BUCKET_BYTES, *caps] if self.cfg.parallel.ddp.bucket_cap_mb == DDPOptions.bucket_cap_mb else caps


class AccelerateFSDP(FSDP):
    """FSDP2 with Accelerate's own units, deferred reduction, and outputs in the compute dtype.

    The tail's unit (``Carving``) stays gathered after forward, so the last block's all-gather starts in its backward,
    not in the root's. ``no_sync`` (set_requires_gradient_sync) keeps whole gradients until the last micro-step. The
    weights come from the host, one whole unit at a time.
    """

    always_divides_loss = True

    def __init__(self, cfg: RunConfig, tape: Tape, specs: list[ParameterSpec]) -> None:
        super().__init__(cfg, tape, specs)
        self.carving = Carving(cfg.model)
        self.units = {i: Unit(i) for i in self.carving.units}
        self.unhooked: tuple[Tensor, int] | None = None  # an output that needed no gradient, and its position

    def unit_of(self, spec: ParameterSpec) -> int:
        return self.carving.unit_of(spec)

    def build(self) -> None:
        held: list[Tensor] = []  # fsdp2_prepare_model's variables input_weight and output_weight, to its end
        order = [u for u in self.carving.shard_order if any(self.unit_of(s) == u for s in self.specs)]
        if not self.tape.trace.on_device_kernels:  # every unit has a mesh of its own, an int32 tensor
            self.kept += [self.tape.new(self.world, 4, "device mesh") for _ in order]
        for index in order:
            members = [s for s in self.specs if self.unit_of(s) == index]
            category = MemoryCategory.PARAMETERS
            whole = [self.tape.new(s.numel, self.itemsize_of(s), f"whole {s.name}", category) for s in members]
            for spec, tensor in zip(members, whole, strict=True):
                self.add_shard(spec)
                if spec.name in self.carving.looked_at:
                    held.append(tensor)
            del whole, tensor

    def reshards(self, unit: int) -> bool:
        return unit != self.carving.tail and super().reshards(unit)

    def enter_source(self, module: str) -> None:
        """The embedding's tokens need no gradient: its unit is reduced when backward is over."""
        if module in self.carving.first:
            self.pre_forward(self.carving.first[module])

    def enter(self, module: str, x: Tensor) -> Tensor:
        if module not in self.carving.first:
            return x
        self.pre_forward(self.carving.first[module])
        return self.wrap_input(self.carving.first[module], x)

    def leave(self, module: str, y: Tensor) -> Tensor:
        return self.post_forward(self.carving.last[module], y) if module in self.carving.last else y

    def pre_forward(self, unit: int) -> None:
        if self.unhooked is not None:  # transformers has made the embedding's output a leaf by now, if it does
            out, position = self.unhooked
            if out.node is not None:
                out.node.hooks = [*(out.node.hooks or []), lambda: self._pre_backward(position)]
            self.unhooked = None
            del out
        if self.units[unit].members:
            super().pre_forward(unit)

    def post_forward(self, unit: int, out: Tensor) -> Tensor:
        """The root's output, the fp32 loss, is cast to output_dtype."""
        if not self.units[unit].members:  # a root whose every parameter is in another unit
            self.previous = None
        elif out.node is None:
            self.unhooked = out, len(self.order)
            self.order.append(unit)
            if self.reshards(unit):
                self.free(self.units[unit])
        else:
            out = super().post_forward(unit, out)
        if unit >= 0 or not self.mixed:
            return out
        loss, tape = MemoryCategory.LOGITS_AND_LOSS, self.tape

        def backward(grads: Grads) -> Grads:
            return [tape.new(1, FP32, "loss gradient, fp32", loss)]

        cast = tape.new(1, self.compute_itemsize, "loss in output_dtype", loss)
        cast.node = Node(tape, [out], backward)
        return cast

    def post_backward(self, unit: Unit) -> None:
        if not unit.members:
            return
        if self.last_micro_step:
            super().post_backward(unit)
        else:
            self.free(unit)

    def end_backward(self) -> None:
        """An all-gather that was started for a unit whose backward never came is dropped (finalize_backward)."""
        super().end_backward()
        for unit in self.units.values():
            unit.all_gather = None

    def zero_grad(self) -> None:
        for index in self.carving.zero_order:
            self.units[index].sharded_grad = None


ACCELERATE_RULES: dict[Strategy, type[Rule]] = {
    Strategy.SINGLE: AccelerateSingle,
    Strategy.DDP: AccelerateDDP,
    Strategy.ZERO1: Zero1,
    Strategy.ZERO2: Zero2,
    Strategy.ZERO3: Zero3,
    Strategy.FSDP: AccelerateFSDP,
    Strategy.FSDP_GRAD_OP: AccelerateFSDP,
}
