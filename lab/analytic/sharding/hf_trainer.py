"""engine=hf_trainer: Accelerate's rules with what transformers.Trainer's loop holds (5.23, trainer.py, _run_epoch).

The gradient norm that clipping returns lives until the next one is made: it may be logged. DDP is told to look for
unused parameters (``RunConfig.ddp_finds_unused``) or not: if it is, its buckets are then made at construction
and never again (distributed.py, _ddp_init_helper; reducer.hpp, should_rebuild_buckets), beside maps of what was used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from lab.analytic.architecture import ParameterSpec
from lab.analytic.dora import MAGNITUDE
from lab.analytic.families.inventory import PREFIX, embedding_module
from lab.analytic.ops import Quantized
from lab.analytic.optimizers import clip_gradients
from lab.analytic.optimizers_8bit import BitsAndBytes
from lab.analytic.sharding.accelerate import AccelerateDDP, AccelerateSingle
from lab.analytic.sharding.base import PARAMETERS, Rule
from lab.analytic.sharding.from_pretrained import Stored, from_pretrained
from lab.analytic.sharding.zero import Zero1, Zero2
from lab.analytic.sharding.zero3 import Zero3
from lab.analytic.tape import Event, Tensor, Trace
from lab.vocab import Strategy


class _Clipped(Rule):
    """_clip_grad_norm (with max_grad_norm 0 the same with an infinite one, for the log), then the step."""

    grad_norm: Tensor | None = None
    loaded: Stored | None = None

    @cached_property
    def _loads_quantized(self) -> bool:
        quantized = any(s.quantized for s in self.specs)
        return quantized and self.tape.trace.on_device_kernels and self.cfg.adapter.kind != "dora"

    @property
    def autocast(self) -> bool:
        return super().autocast or self.cfg.engine.autocast

    def draws_only(self, specs: Sequence[ParameterSpec]) -> bool:
        return not self._loads_quantized and super().draws_only(specs)

    def draw(self, spec: ParameterSpec, trace: Trace) -> Event:
        """The weights come from the host as they are."""
        return trace.allocate(spec.numel * self.itemsize_of(spec), PARAMETERS, spec.name)

    def materialise(self, spec: ParameterSpec) -> tuple[Tensor, Quantized | None]:
        """The weights come from the host as they are, quantized ones through ``from_pretrained``."""
        if self._loads_quantized:
            if self.loaded is None:
                self.loaded = from_pretrained(self)
            return self.loaded.pop(spec.name)
        if spec.quantized:
            return super().materialise(spec)
        return self.tape.new(spec.numel, self.itemsize_of(spec), spec.name, PARAMETERS), None

    def build(self) -> None:
        """create_optimizer tells bitsandbytes to keep the states of every nn.Embedding's weight in 32 bits.

        Not under DeepSpeed: what its optimizer is given is no module's parameter.
        """
        super().build()
        if isinstance(self.optimizer, BitsAndBytes):
            self.optimizer.in_32_bits = frozenset(
                (group, place)
                for group, members in enumerate(self._groups())
                for place, spec in enumerate(members)
                if spec.name.rpartition(".")[0] in (embedding_module(self.cfg.model), f"{PREFIX}transformer.wpe")
            )

    def optimizer_step(self) -> None:
        self.grad_norm = None
        self.grad_norm = clip_gradients(self.tape, self.optimizer_parameters())
        for group, members in enumerate(self._groups()):
            sizes = [(s.numel, self.itemsize_of(s)) for s in members]
            self.optimizer.step(sizes, [s.shape for s in members], group=group)

    def stepped(self) -> list[ParameterSpec]:
        return [s for group in self._groups() for s in group]

    def _groups(self) -> list[list[ParameterSpec]]:
        """create_optimizer: with weight decay; norms and biases without. One is stepped after the other.

        What is neither by its name is decayed, DoRA's magnitudes too (get_decay_parameter_names).
        """
        return [
            [s for s in self.trained if (len(s.shape) > 1 or MAGNITUDE in s.name) is decayed]
            for decayed in (True, False)
        ]


class TrainerSingle(_Clipped, AccelerateSingle):
    """One process."""


class TrainerDDP(_Clipped, AccelerateDDP):
    """DDP, told to look for unused parameters or not."""

    @property
    def counts_used(self) -> bool:
        return self.cfg.ddp_finds_unused or super().counts_used

    def first_buckets(self) -> list[Tensor]:
        if self.cfg.parallel.ddp.static_graph or not self.cfg.ddp_finds_unused:
            return super().first_buckets()
        self.rebuilt = True  # as they stay
        return self._buckets(self.trained, self.bucket_caps())


TRAINER_RULES: dict[Strategy, type[Rule]] = {
    Strategy.SINGLE: TrainerSingle,
    Strategy.DDP: TrainerDDP,
    Strategy.ZERO1: Zero1,
    Strategy.ZERO2: Zero2,
    Strategy.ZERO3: Zero3,
}
