"""LoRA beside frozen Linears as peft computes it, DoRA's parameters (``dora``: its forward), and what merging takes.

Source: peft 0.21, tuners/lora/layer.py (Linear), bnb.py (Linear4bit, Linear8bitLt), variants.py. The adapter's
weights are fp32 (autocast_adapter_dtype), so its input is cast to fp32 where it is not (the bitsandbytes layers
leave that to CUDA's autocast). A frozen base keeps nothing of its own; the adapter keeps its dropped-out input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lab.analytic.architecture import ParameterSpec
from lab.analytic.ops import Ops
from lab.analytic.quantization import matches
from lab.analytic.tape import FP32, Grads, Tensor
from lab.config import AdapterConfig, QuantizationConfig

ALL_LINEAR = "all-linear"
Module = Callable[[Tensor], Tensor]


def targets(spec: ParameterSpec, cfg: AdapterConfig) -> bool:
    """Is this parameter the weight of a Linear that gets an adapter? ``all-linear``: every Linear inside a block."""
    if not spec.linear or cfg.kind == "none":
        return False
    if ALL_LINEAR in cfg.target_modules and spec.unit >= 0:
        return True
    return matches(spec.name.removesuffix(".weight"), cfg.target_modules)


def adapt(
    specs: list[ParameterSpec], cfg: AdapterConfig, quantization: QuantizationConfig, embedding: str
) -> list[ParameterSpec]:
    """The base frozen, each target followed by its adapter's weights: A [r, in], B [out, r], DoRA's magnitude [out].

    With ``prepare_kbit`` what is not quantized beside a quantized base is fp32. ``train_embeddings``: the parameter
    named ``embedding`` is trained.
    """
    if cfg.kind == "none":
        return specs
    upcast = cfg.prepare_kbit and quantization.kind != "none"
    out: list[ParameterSpec] = []
    pending: list[ParameterSpec] = []
    for spec in specs:
        name = spec.name.removesuffix(".weight")
        if not spec.name.endswith(".bias"):  # a bias stands between its weight and the adapter
            out, pending = out + pending, []
        trained = cfg.train_embeddings and spec.name == embedding
        out.append(replace(spec, trainable=trained, wide=spec.wide or (upcast and not spec.quantized)))
        if targets(spec, cfg):
            rows, columns = reversed(spec.shape) if spec.transposed else spec.shape
            shapes: dict[str, tuple[int, ...]] = {
                "lora_A.weight": (cfg.rank, columns),
                "lora_B.weight": (rows, cfg.rank),
            }
            if cfg.kind == "dora":
                shapes["lora_magnitude_vector.weight"] = (rows,)
            pending = [ParameterSpec(f"{name}.{leaf}", shape, spec.unit, wide=True) for leaf, shape in shapes.items()]
    return out + pending


def merge_bytes(specs: list[ParameterSpec], cfg: AdapterConfig, base_itemsize: int = FP32) -> int:
    """Bytes that merging takes beside the model, at the largest target.

    LoRA (peft/tuners/lora/layer.py, get_delta_weight): B @ A and that times the scaling, fp32; the sum goes into the
    weight in place. DoRA (variants.py, merge_unsafe): a copy of the base, in its own type (``base_itemsize``), the
    delta, its sum with the base (which autograd keeps), that times magnitudes over norms, with those two, and its cast.
    """
    sizes = [(s.numel, s.shape[-1 if s.transposed else 0]) for s in specs if targets(s, cfg)]
    if cfg.kind == "dora":
        each = base_itemsize + 3 * FP32 + (base_itemsize if base_itemsize != FP32 else 0)
        return max((each * numel + 2 * FP32 * rows for numel, rows in sizes), default=0)
    return max((2 * FP32 * numel for numel, _ in sizes), default=0)


def lora(
    ops: Ops,
    base: Module,
    down: Module,
    up: Module,
    dropout: Module,
    x: Tensor,
    itemsize: int,
    label: str,
    quantized: str,
) -> Tensor:
    """base(x) + up(down(dropout(x))) * scaling, in base's output type. ``itemsize`` is the adapter's weights'.

    ``quantized`` (the base's kind, "" if plain): a 4-bit base's output is cloned first; under CUDA's autocast the
    bitsandbytes layers neither cast x to the adapter's type nor its output to the base's.
    """
    result = base(x)
    if quantized and quantized != "int8":
        result = _clone(ops, result, label)
    size_out = result.itemsize
    converts = not quantized or ops.amp is None or not ops.tape.trace.on_device_kernels
    if converts:
        x = ops.cast(x, itemsize, label + " adapter input, fp32")
    delta = _low_rank(ops, x, down, up, dropout, label)
    if converts and quantized:
        delta = ops.cast(delta, size_out, label + " adapter output, base's type")
    result = ops.add(result, delta, label + " adapted")
    del delta
    return ops.cast(result, size_out, label + " adapted, base's type")


def _low_rank(ops: Ops, x: Tensor, down: Module, up: Module, dropout: Module, label: str) -> Tensor:
    """up(down(dropout(x))) * scaling. Only the last tensor and what backward needs is left; a module's input stays
    until it returns (nn.Module.__call__ holds it).
    """
    dropped = dropout(x)
    small = down(dropped)
    del dropped
    large = up(small)
    del small
    return ops.scale(large, label + " adapter output")


def _clone(ops: Ops, x: Tensor, label: str) -> Tensor:
    y = ops.new(x.numel, x.itemsize, label + " clone")
    y.node = ops.tape.node([x], _pass)
    return y


def _pass(grads: Grads) -> Grads:
    return [grads[0]]
