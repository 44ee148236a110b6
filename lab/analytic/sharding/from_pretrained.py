"""Weights that ``from_pretrained`` quantizes while it loads them onto a GPU, as one does before a QLoRA in a Trainer.

Source: transformers 5.17 and 5.23, modeling_utils.py (caching_allocator_warmup), core_model_loading.py
(convert_and_load_state_dict_in_model); peft 0.21 utils/other.py (prepare_model_for_kbit_training),
tuners/lora/layer.py, tuners/tuners_utils.py (cast_adapter_dtype).
"""

from __future__ import annotations

from lab.analytic.architecture import ParameterSpec
from lab.analytic.ops import Quantized
from lab.analytic.quantization import compute_itemsize
from lab.analytic.sharding.base import PARAMETERS, Rule
from lab.analytic.tape import Tensor

Stored = dict[str, tuple[Tensor, Quantized | None]]


def from_pretrained(rule: Rule) -> Stored:
    """Every parameter of ``rule``, by name, after loading, k-bit preparation and LoRA.

    One block of all loaded bytes comes first and goes at once. Weights follow in the natural order of their names, in
    the dtype asked for (taken to be that of the products), each quantized before the next. The preparation casts what
    is not quantized; adapters are made in that dtype and cast when all of them are there.
    """
    tape, size = rule.tape, compute_itemsize(rule.cfg.quantization)
    base = [s for s in rule.specs if not _is_adapter(s)]
    bits = 8 if rule.cfg.quantization.kind == "int8" else 4
    tape.new(sum(s.numel * bits // 8 if s.quantized else s.numel * size for s in base) // 2, 2, "allocator's warm-up")
    out: Stored = {}
    for spec in sorted(base, key=_natural):
        tensor = tape.new(spec.numel, size, spec.name, PARAMETERS)
        out[spec.name] = rule.quantizer.store(spec, tensor) if spec.quantized else (tensor, None)
        del tensor
    _cast(rule, out, [s for s in base if not s.quantized], size)
    adapters = [s for s in rule.specs if _is_adapter(s)]
    for spec in adapters:
        out[spec.name] = tape.new(spec.numel, size, spec.name, PARAMETERS), None
    _cast(rule, out, adapters, size)
    return out


def _cast(rule: Rule, stored: Stored, specs: list[ParameterSpec], size: int) -> None:
    for spec in specs:
        if (wanted := rule.itemsize_of(spec)) != size:
            stored[spec.name] = rule.tape.new(spec.numel, wanted, spec.name, PARAMETERS), None


def _is_adapter(spec: ParameterSpec) -> bool:
    return ".lora_" in spec.name


def _natural(spec: ParameterSpec) -> list[tuple[bool, int, str]]:
    """dot_natural_key: numbers by value."""
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in spec.name.split(".")]
