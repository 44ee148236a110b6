"""Quantization with bitsandbytes: Linear4bit and Linear8bitLt in place of a model's Linears.

On the meta device the layers are swapped; a weight is quantized when it is materialised (``quantized_parameter``), so
that one weight at a time exists in its own type. What dequantizes it hangs on the weight or on the module, invisible
to ``parameters()``: ``quantization_state`` finds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lab.config import ConfigError, QuantizationConfig, RunConfig
from lab.transforms.bnb import import_bitsandbytes

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "uint8": torch.uint8}
_PARAMETERS, _LAYERS = ("Params4bit", "Int8Params"), ("Linear4bit", "Linear8bitLt")


def check_compute_dtype(cfg: RunConfig, device: torch.device) -> None:
    """ConfigError where 4-bit products are asked for in bf16 and the GPU has none (before compute capability 8.0)."""
    q = cfg.quantization
    if q.kind in ("none", "int8") or q.compute_dtype != "bf16" or device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        reason = f"this GPU (compute capability {major}.{minor}) has no bf16: set fp16 and precision=fp16_mixed"
        raise ConfigError("quantization.compute_dtype", "bf16", reason)


def check_storage_dtype(cfg: RunConfig) -> None:
    """ConfigError where FSDP2 cannot cut packed bytes: torch 2.11 makes parameters of them that require gradients.

    Source: torch/distributed/fsdp/_fully_shard/_fsdp_param.py, _init_sharded_param; pytorch issue 177844. 2.13 does
    not; 2.12 was not tried and is refused too, since a float type takes the same memory.
    """
    q = cfg.quantization
    if not cfg.parallel.strategy.is_fsdp or q.kind in ("none", "int8") or q.storage_dtype != "uint8":
        return
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        reason = f"FSDP2 of torch {torch.__version__} cuts floating-point parameters only: set bf16, fp16 or fp32"
        raise ConfigError("quantization.storage_dtype", "uint8", reason)


def quantize_linears(model: nn.Module, cfg: QuantizationConfig) -> nn.Module:
    """Swap every ``nn.Linear`` of a meta model, except ``skip_modules``; biases stay. Nothing for kind=none.

    ``is_loaded_in_4bit`` (``_8bit``) is what peft reads to choose its own quantized layers.
    """
    if cfg.kind == "none":
        return model
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not _matches(name, cfg.skip_modules):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _quantized_linear(module, cfg))
    model.is_loaded_in_8bit = cfg.kind == "int8"
    model.is_loaded_in_4bit = cfg.kind != "int8"
    return model


def _matches(name: str, wanted: tuple[str, ...]) -> bool:
    return any(name == w or name.endswith("." + w) for w in wanted)


def _quantized_linear(linear: nn.Linear, cfg: QuantizationConfig) -> nn.Module:
    """The same layer on the meta device, its weight marked for quantization."""
    library = import_bitsandbytes().nn
    sizes = (linear.in_features, linear.out_features)
    layer: nn.Module
    if cfg.kind == "int8":
        layer = library.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=0.0, device="meta")
        layer.weight.requires_grad_(False)
        _watch_inputs(layer)
    else:
        kind, nested = cfg.kind.removesuffix("_double"), cfg.kind.endswith("_double")
        layer = library.Linear4bit(*sizes, bias=False, compute_dtype=_DTYPES[cfg.compute_dtype], device="meta")
        storage = layer.quant_storage = _DTYPES[cfg.storage_dtype]
        layer.weight = library.Params4bit(
            layer.weight.data,
            requires_grad=False,
            blocksize=cfg.block_size,
            compress_statistics=nested,
            quant_type=kind,
            quant_storage=storage,
            module=layer,
        )
    layer.bias = linear.bias
    return layer.train(linear.training)


def cast_unquantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Every floating-point parameter of a meta model that will not be packed."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not is_quantized(parameter):
            parameter.data = parameter.data.to(dtype)


def is_quantized(parameter: nn.Parameter) -> bool:
    """Is (or, on the meta device, will be) this parameter stored packed?"""
    return type(parameter).__name__ in _PARAMETERS


def dtype_to_quantize(module: nn.Module, old: nn.Parameter) -> torch.dtype:
    """4 bit: the compute dtype, in which backward will dequantize; int8: fp16, as bitsandbytes casts to."""
    dtype: torch.dtype = torch.float16 if type(old).__name__ == "Int8Params" else module.compute_dtype
    return dtype


def quantized_parameter(module: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
    """``value`` [out, in] on its device -> the packed parameter that takes the meta parameter's place in ``module``."""
    kind: Any = type(old)
    if kind.__name__ == "Int8Params":
        new = kind(value, requires_grad=False, has_fp16_weights=False)
    else:
        new = kind(
            value,
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=module,
        )
    packed: nn.Parameter = new._quantize(value.device)
    return packed


def quantization_state(model: nn.Module) -> Iterator[Tensor]:
    """absmax, code tables, offsets and int8's row maxima of every quantized Linear, and bitsandbytes' own table."""
    nested = False
    for module in model.modules():
        if type(module).__name__ not in _LAYERS:
            continue
        weight = module.weight  # under FSDP2 a plain parameter
        states = [getattr(weight, "quant_state", None), getattr(module, "quant_state", None)]
        states += [getattr(state, "state2", None) for state in states]
        nested = nested or states[-1] is not None
        holders = [*states, weight, getattr(module, "state", None)]
        for holder in holders:
            values = vars(holder) if holder is not None else {}
            yield from (values[k] for k in ("absmax", "code", "offset", "SCB") if isinstance(values.get(k), Tensor))
    if nested:
        yield from (t for t in import_bitsandbytes().functional.name2qmap.values() if isinstance(t, Tensor))


def _watch_inputs(layer: nn.Module) -> None:
    """Remember weakly what an int8 layer is given: bitsandbytes keeps it as an attribute of its autograd context.

    So no saved-tensor hook sees it, and it stays until the graph is dropped.
    """
    seen: dict[int, Any] = {}
    layer.kept_inputs = seen

    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        storage = args[0].untyped_storage()
        seen[storage._cdata] = weakref.ref(storage)

    layer.register_forward_pre_hook(remember)


def kept_inputs(model: nn.Module) -> Iterator[Tensor]:
    """Inputs of int8 layers that are still alive, as byte tensors over their storages."""
    for module in model.modules():
        seen: dict[int, Any] = getattr(module, "kept_inputs", {})
        for key, reference in list(seen.items()):
            storage = reference()
            if storage is None:
                del seen[key]
            else:
                yield torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
