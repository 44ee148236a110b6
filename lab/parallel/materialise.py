"""Initial weights that depend on the seed and the parameter's name only.

Every strategy and world size starts from the same weights: each parameter is drawn whole, in fp32, on
the target device, from a generator of its own, then cast and (where sharded) cut. One whole parameter
at a time exists besides the model, at build only.

Scheme (GPT-2, Radford 2019, section 2.3; as in nanoGPT): normal with deviation 0.02, the projections
that write into the residual stream 0.02 / sqrt(2 * num_layers); norms 1, biases 0.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lab.transforms.quantization import dtype_to_quantize, is_quantized, quantized_parameter

RESIDUAL_PROJECTIONS = ("o_proj", "down_proj", "c_proj")
STANDARD_DEVIATION = 0.02
MAGNITUDE = "lora_magnitude_vector"


@dataclass
class Slot:
    """One parameter and every place in the module tree that holds it (two with a tied head).

    ``name`` is that without adapters around (no ``base_layer``), so that the base's weights do not depend on them.
    ``stored`` reads its value from a checkpoint, on the host; None where it is drawn. ``base``: for DoRA's magnitudes,
    the weight whose rows they are the norms of.
    """

    name: str
    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    stored: Callable[[], Tensor] | None = None
    base: Slot | None = None

    def put(self, parameter: nn.Parameter) -> None:
        """Replace the parameter everywhere; ties stay ties."""
        self.parameter = parameter
        for module, leaf in self.places:
            setattr(module, leaf, parameter)


def slots(model: nn.Module) -> list[Slot]:
    """The model's parameters in the order of ``named_parameters``, aliases joined."""
    found: dict[int, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=True):
        for leaf, parameter in module.named_parameters(recurse=False):
            name = (f"{prefix}.{leaf}" if prefix else leaf).replace(".base_layer.", ".")
            found.setdefault(id(parameter), Slot(name, parameter)).places.append((module, leaf))
    if (stored := getattr(model, "stored_value", None)) is not None:  # a checkpoint's, for a Hugging Face model
        for slot in found.values():
            slot.stored = stored(slot.name)
    by_name = {slot.name: slot for slot in found.values()}
    saved: dict[str, Tensor] = model.__dict__.get("saved_adapter", {})
    for slot in found.values():
        target, magnitude, _ = slot.name.partition(f".{MAGNITUDE}.")
        slot.base = by_name[f"{target}.weight"] if magnitude else None
        if slot.name in saved:
            slot.stored = partial(saved.__getitem__, slot.name)
    return list(found.values())


def initial_value(slot: Slot, seed: int, num_layers: int, device: torch.device) -> Tensor:
    """The whole parameter on ``device``: drawn in fp32, or as the checkpoint has it, in the parameter's own type.

    Raises TypeError for a module kind that it cannot draw.
    """
    module, leaf = slot.places[0]
    shape, kind = slot.parameter.shape, type(module).__name__
    if slot.stored is not None:  # cast on the host, so that the device never holds both types
        return torch.empty(shape, dtype=slot.parameter.dtype, device=device).copy_(slot.stored())
    if slot.base is not None:  # the adapter itself adds nothing yet: the norms are those of the base
        inputs = 0 if type(slot.base.places[0][0]).__name__ == "Conv1D" else 1
        base: Tensor = torch.linalg.norm(initial_value(slot.base, seed, num_layers, device), dim=inputs)
        return base
    if isinstance(module, (nn.RMSNorm, nn.LayerNorm)) or "RMSNorm" in kind:
        ones = leaf == "weight" and kind != "GemmaRMSNorm"  # which adds one itself
        return torch.ones(shape, device=device) if ones else torch.zeros(shape, device=device)
    if not isinstance(module, (nn.Linear, nn.Embedding)) and kind != "Conv1D":
        raise TypeError(f"{slot.name}: no initialisation for a parameter of {type(module).__name__}")
    if leaf == "bias" or "lora_B" in slot.name:
        return torch.zeros(shape, device=device)
    deviation = STANDARD_DEVIATION
    if any(part in RESIDUAL_PROJECTIONS for part in slot.name.split(".")):
        deviation /= math.sqrt(2 * num_layers)
    # 32 bits: the CPU's generator drops the upper half of a seed.
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {slot.name}".encode()))
    if "lora_A" in slot.name:  # peft: kaiming_uniform_ with a = sqrt(5)
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape, device=device).normal_(0.0, deviation, generator=generator)


def materialise(
    model: nn.Module, seed: int, num_layers: int, device: torch.device, only: set[int] | None = None
) -> Iterator[Slot]:
    """Replace meta parameters by whole, initialised ones in their own dtype, yielding each when it is there.

    ``only`` restricts to these parameters (by ``id``): ZeRO-3 partitions a block before the next one exists.
    """
    materialise_buffers(model, device, only_meta=True)
    for slot in slots(model):
        if slot.parameter.is_meta and (only is None or id(slot.parameter) in only):
            slot.put(initial_parameter(slot, seed, num_layers, device))
            yield slot


def initial_parameter(slot: Slot, seed: int, num_layers: int, device: torch.device) -> nn.Parameter:
    """The whole parameter in its own dtype, or packed where the layer is quantized."""
    module, old = slot.places[0][0], slot.parameter
    if is_quantized(old):
        value = initial_value(slot, seed, num_layers, device).to(dtype_to_quantize(module, old))
        return quantized_parameter(module, old, value)
    return nn.Parameter(initial_value(slot, seed, num_layers, device).to(old.dtype), requires_grad=old.requires_grad)


def materialise_buffers(model: nn.Module, device: torch.device, only_meta: bool) -> None:
    """Buffers that a Hugging Face model computes (rotary frequencies); the lab's own decoder has none."""
    make = getattr(model, "materialise_buffers", None)
    if make is not None and not (only_meta and not any(b.is_meta for b in model.buffers())):
        make(device)
