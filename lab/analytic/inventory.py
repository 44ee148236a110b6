"""What a run stores: the model's parameters, which of them are quantized or frozen, and the adapters between them."""

from __future__ import annotations

from lab.analytic.adapters import adapt
from lab.analytic.architecture import ParameterSpec, parameters, tied_modules
from lab.analytic.quantization import quantize
from lab.config import RunConfig


def inventory(cfg: RunConfig) -> list[ParameterSpec]:
    """All parameters of the run in ``nn.Module.parameters()`` order, after quantization and adapters."""
    specs = quantize(parameters(cfg.model), cfg.quantization)
    return adapt(specs, cfg.adapter, cfg.quantization, f"{tied_modules(cfg.model)[1]}.weight")


def trainable(cfg: RunConfig) -> list[ParameterSpec]:
    """Those that have gradients and optimizer states."""
    return [s for s in inventory(cfg) if s.trainable]
