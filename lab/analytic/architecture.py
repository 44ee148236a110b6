"""Tensor inventory of a model from ModelConfig alone: every parameter's name, shape and place.

The lab's decoder is here, others are in ``families``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from math import prod
from operator import attrgetter
from typing import NamedTuple

from lab.config import ModelConfig

_unit = attrgetter("unit")


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter; ``unit`` is the block it belongs to, or -1 for embeddings, final norm and head."""

    name: str
    shape: tuple[int, ...]
    unit: int
    linear: bool = False  # the weight of a Linear, [out, in]: what quantization and adapters are about
    transposed: bool = False  # a linear one that is [in, out]: transformers' Conv1D, which is never quantized here
    trainable: bool = True
    quantized: str = ""  # int8 | fp4 | nf4 | nf4_double: stored packed
    wide: bool = False  # fp32 whatever the precision: adapters, and what peft's k-bit preparation upcasts

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)

    @cached_property
    def block(self) -> str:
        """The module that holds the parameter and has its like in every layer; "" for the root's."""
        before, inside, _ = self.name.partition(f".{self.unit}.")
        return f"{before}.{self.unit}" if inside else ""

    @cached_property
    def kind(self) -> Hashable:
        """Equal where the name inside the block is, the shape, and all that says how the parameter is stored."""
        return self.name[len(self.block) :], self.shape, self.trainable, self.quantized, self.wide


class UnitSpecs(NamedTuple):
    """Parameters of one unit that follow each other; ``block`` and ``kind`` as theirs."""

    block: str
    specs: list[ParameterSpec]
    kind: Hashable


def by_unit(specs: Iterable[ParameterSpec]) -> list[UnitSpecs]:
    """The same, cut where a unit begins or ends."""
    return [unit_specs(list(group)) for _, group in groupby(specs, key=_unit)]


def unit_specs(specs: list[ParameterSpec]) -> UnitSpecs:
    """Parameters of one unit."""
    return UnitSpecs(specs[0].block, specs, tuple([s.kind for s in specs]))


def parameters(model: ModelConfig) -> list[ParameterSpec]:
    """All parameters in ``nn.Module.parameters()`` order (a tied head adds none)."""
    if model.family != "lab":
        from lab.analytic.families.inventory import hf_parameters

        return hf_parameters(model)
    return list(_decoder_parameters(model))


@lru_cache(maxsize=8)
def _decoder_parameters(model: ModelConfig) -> tuple[ParameterSpec, ...]:
    h, f, d = model.hidden_size, model.intermediate_size, model.head_dim
    q, kv = model.num_heads * d, model.num_kv_heads * d
    specs = [ParameterSpec("embedding.weight", (model.vocab_size, h), -1)]
    if model.position == "learned":
        specs.append(ParameterSpec("position.weight", (model.max_seq_len, h), -1))

    def norm(prefix: str, unit: int) -> None:
        specs.append(ParameterSpec(f"{prefix}.weight", (h,), unit))
        if model.norm == "layernorm" and model.bias:
            specs.append(ParameterSpec(f"{prefix}.bias", (h,), unit))

    def linear(prefix: str, out_features: int, in_features: int, unit: int) -> None:
        specs.append(ParameterSpec(f"{prefix}.weight", (out_features, in_features), unit, linear=True))
        if model.bias:
            specs.append(ParameterSpec(f"{prefix}.bias", (out_features,), unit))

    for i in range(model.num_layers):
        b = f"blocks.{i}"
        norm(f"{b}.attention_norm", i)
        if model.fused_qkv:
            linear(f"{b}.attention.qkv_proj", q + 2 * kv, h, i)
        else:
            linear(f"{b}.attention.q_proj", q, h, i)
            linear(f"{b}.attention.k_proj", kv, h, i)
            linear(f"{b}.attention.v_proj", kv, h, i)
        linear(f"{b}.attention.o_proj", h, q, i)
        norm(f"{b}.mlp_norm", i)
        if model.mlp == "swiglu":
            linear(f"{b}.mlp.gate_proj", f, h, i)
        linear(f"{b}.mlp.up_proj", f, h, i)
        linear(f"{b}.mlp.down_proj", h, f, i)
    norm("norm", -1)
    if not model.tied_head:
        specs.append(ParameterSpec("head.weight", (model.vocab_size, h), -1, linear=True))
    return tuple(specs)


def num_parameters(model: ModelConfig) -> int:
    """Elements of all parameters; a tied head counts once."""
    return sum(p.numel for p in parameters(model))


def tied_modules(model: ModelConfig) -> tuple[str, str]:
    """(output head, token embedding): the modules that share a weight with ``tied_head``."""
    if model.family == "lab":
        return "head", "embedding"
    from lab.analytic.families.inventory import PREFIX, embedding_module

    return f"{PREFIX}lm_head", embedding_module(model)
