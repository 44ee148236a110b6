"""Quantized Linears of bitsandbytes: what is stored, and what forward and backward take for a moment.

Source: bitsandbytes 0.50, functional.py (quantize_4bit, quantize_blockwise, dequantize_4bit), autograd/_functions.py
(MatMul4Bit, MatMul8bitLt, MatMul8bitFp), nn/modules.py, backends/cuda/ops.py. On a GPU the 4-bit product of more than
1536 rows dequantizes the weight and multiplies; fewer rows go through a kernel that allocates its output alone.
The weights are frozen, so backward makes the input's gradient only, from a weight dequantized anew: the input of
a 4-bit product is not kept. An int8 product's is, as an attribute of its context: nothing drops it before the graph
goes.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from lab.analytic.architecture import ParameterSpec
from lab.analytic.gemm_4bit import runs_as_one_kernel
from lab.analytic.ops import Ops, Parameter, Quantized
from lab.analytic.reduce import norm_workspace_bytes
from lab.analytic.tape import BF16, FP32, Grads, Node, Tape, Tensor
from lab.config import QuantizationConfig
from lab.vocab import MemoryCategory

STATE = MemoryCategory.QUANTIZATION_STATE
NESTED_BLOCK = 256  # 8-bit absmax values that share one fp32 absmax
CODE_4BIT, CODE_8BIT = 16, 256  # entries of the code tables, fp32
_ITEMSIZE = {"uint8": 1, "bf16": BF16, "fp16": BF16, "fp32": FP32}


def matches(name: str, wanted: tuple[str, ...]) -> bool:
    """peft's and transformers' rule: a module's whole name, or its last parts."""
    return any(name == w or name.endswith("." + w) for w in wanted)


def quantize(specs: list[ParameterSpec], cfg: QuantizationConfig) -> list[ParameterSpec]:
    """The Linears' weights are stored packed, all but the skipped modules'; every other parameter as before."""
    if cfg.kind == "none":
        return specs
    return [
        replace(s, quantized=cfg.kind, trainable=False)
        if s.linear and not s.transposed and not matches(s.name.removesuffix(".weight"), cfg.skip_modules)
        else s
        for s in specs
    ]


def packed_shape(numel: int, cfg: QuantizationConfig) -> tuple[int, int]:
    """(elements, bytes per element) of a stored weight: n of int8; ceil(n / 2) bytes of 4 bit, as storage_dtype."""
    if cfg.kind == "int8":
        return numel, 1
    size = _ITEMSIZE[cfg.storage_dtype]
    return (numel + 1) // (2 * size), size


def state_bytes(shape: tuple[int, ...], cfg: QuantizationConfig) -> dict[str, int]:
    """Bytes beside a stored weight of ``shape``, by what they are.

    int8: 4 per row. 4 bit: 4 * ceil(n / block_size) and a table of 16. Double: ceil(n / block_size) of 8 bit, 4 per 256
    of those, tables of 16 and 256, and the mean that was taken off.
    """
    if cfg.kind == "int8":
        return {"row maxima": FP32 * shape[0]}
    blocks = -(-prod(shape) // cfg.block_size)
    if cfg.kind != "nf4_double":
        return {"absmax": FP32 * blocks, "4-bit code": FP32 * CODE_4BIT}
    nested = {"absmax, 8 bit": blocks, "nested absmax": FP32 * -(-blocks // NESTED_BLOCK)}
    return {**nested, "4-bit code": FP32 * CODE_4BIT, "8-bit code": FP32 * CODE_8BIT, "absmax offset": FP32}


def compute_itemsize(cfg: QuantizationConfig) -> int:
    """Bytes per element of the product's operands, and of the weight before it is quantized (int8: fp16)."""
    if cfg.kind == "int8":
        return BF16
    return _ITEMSIZE[cfg.compute_dtype]


class Quantizer:
    """Makes stored weights; keeps bitsandbytes' global 8-bit code table, made for the first double quantization."""

    def __init__(self, tape: Tape, cfg: QuantizationConfig, num_sms: int = 0) -> None:
        self.tape, self.cfg, self.num_sms = tape, cfg, num_sms
        self.global_code: Tensor | None = None

    def store(self, spec: ParameterSpec, value: Tensor) -> tuple[Tensor, Quantized]:
        """``value`` (in the compute dtype) -> the packed tensor and what dequantizes it. The caller drops ``value``."""
        tape, cfg, name = self.tape, self.cfg, spec.name
        sizes = state_bytes(spec.shape, cfg)
        elements, size = packed_shape(spec.numel, cfg)
        info = Quantized(cfg.kind, spec.numel, cfg.block_size, value.itemsize, "8-bit code" in sizes, [])

        def state(part: str) -> Tensor:
            return tape.new(sizes[part], 1, f"{part} of {name}", STATE)

        if cfg.kind == "int8":
            info.state.append(state("row maxima"))
            packed = tape.new(elements, size, name, MemoryCategory.PARAMETERS)
            return packed, info
        if not info.nested:
            info.state.append(state("absmax"))
            packed = tape.new(elements, size, name, MemoryCategory.PARAMETERS)
            info.state.append(self._code(state("4-bit code")))
            return packed, info
        blocks = sizes["absmax, 8 bit"]
        absmax = tape.new(blocks, FP32, "absmax to be quantized")
        packed = tape.new(elements, size, name, MemoryCategory.PARAMETERS)
        info.state += [self._code(state("4-bit code")), state("absmax offset")]
        if partial := norm_workspace_bytes(blocks, self.num_sms, FP32) if self.num_sms else 0:  # absmax.mean()
            sums = tape.new(partial, 1, "absmax mean, partial sums")
            tape.new(FP32, 1, "absmax mean, semaphores")
            del sums
        difference = tape.new(blocks, FP32, "absmax minus its mean")
        if self.global_code is None:
            self.global_code = tape.new(CODE_8BIT, FP32, "bitsandbytes' 8-bit code", STATE)
        info.state += [state("nested absmax"), state("absmax, 8 bit"), state("8-bit code")]
        del absmax, difference
        return packed, info

    def _code(self, code: Tensor) -> Tensor:
        """get_4bit_type: the table divided by its largest magnitude, data.div_(data.abs().max())."""
        magnitudes = self.tape.new(CODE_4BIT, FP32, "4-bit code, magnitudes")
        largest = self.tape.new(1, FP32, "4-bit code, magnitudes")
        del magnitudes, largest
        return code


def _cast(ops: Ops, x: Tensor, itemsize: int, label: str, other_half: bool) -> Tensor:
    """x.to(dtype), a copy between bf16 and fp16 too (``other_half``)."""
    if other_half and x.itemsize == itemsize == BF16:
        return ops.unary(x, label, False, label + " gradient")
    return ops.cast(x, itemsize, label)


def linear_4bit(
    ops: Ops, x: Tensor, w: Parameter, b: Parameter | None, rows: int, label: str, cfg: QuantizationConfig
) -> Tensor:
    """Linear4bit: x in the compute dtype, the product, its output back in x's type. Keeps nothing but the graph."""
    assert w.quantized is not None
    compute_size = compute_itemsize(cfg)
    other_half = ops.half_is_fp16 is not (cfg.compute_dtype == "fp16")
    tape, info, size_in = ops.tape, w.quantized, x.itemsize
    out_features, in_features = w.shape
    a = _cast(ops, x, compute_size, label + " input, compute copy", other_half)
    if b is not None and b.tensor.itemsize != compute_size:  # bias.data = bias.data.to(...): for good
        narrow = ops.new(b.numel, compute_size, b.name, MemoryCategory.PARAMETERS)
        b.tensor = narrow
        del narrow
    numel_x, blocks = rows * in_features, -(-info.numel // info.block_size)

    def backward(grads: Grads) -> Grads:
        g = grads[0]
        assert g is not None
        absmax = tape.new(blocks, FP32, "dequantized absmax") if info.nested else None
        weight = tape.new(info.numel, info.itemsize, f"dequantized {w.name}")
        del absmax
        if info.itemsize != g.itemsize:
            cast = tape.new(info.numel, g.itemsize, f"dequantized {w.name}, gradient's type")
            weight = cast
            del cast
        gx = tape.new(numel_x, g.itemsize, label + " input gradient")
        ops.matmul_workspace("backward", lt=False)
        del weight
        return [gx]

    node = tape.node([a], backward)
    held: list[Tensor] = []
    if tape.trace.on_device_kernels and not runs_as_one_kernel(
        rows, out_features, in_features, compute_size, info.block_size, ops
    ):
        if info.nested:
            held += [ops.new(blocks, FP32, "dequantized absmax") for _ in range(2)]
        held.append(ops.new(info.numel, compute_size, f"dequantized {w.name}"))
        y = ops.new(rows * out_features, compute_size, label)
        ops.matmul_workspace("forward", lt=b is not None)
    else:
        y = ops.new(rows * out_features, compute_size, label)
    while held:
        held.pop(0)
    y.node = node
    del node
    out = _cast(ops, y, size_in, label + ", input's type", other_half)
    del y
    del a  # x = x.to(self.compute_dtype) is a local of the module's forward
    return out


def linear_int8(
    ops: Ops, x: Tensor, w: Parameter, b: Parameter | None, rows: int, label: str, turned: bool = False
) -> Tensor:
    """Linear8bitLt without outliers: x in int8 times the weight on a GPU, the dequantized weight on a CPU.

    ``turned``: the gradient comes in another order of memory, and backward makes rows of it (reshape).
    """
    assert w.quantized is not None
    tape, info, size, numel_x = ops.tape, w.quantized, x.itemsize, x.numel
    out_features = w.shape[0]
    if b is not None and b.tensor.itemsize != size:
        cast = ops.new(b.numel, size, b.name, MemoryCategory.PARAMETERS)
        b.tensor = cast
        del cast

    def backward(grads: Grads) -> Grads:
        g = grads[0]
        assert g is not None
        if turned:
            g = tape.new(g.numel, g.itemsize, label + " gradient, contiguous")
        weight = tape.new(info.numel, size, f"dequantized {w.name}")
        scales = [tape.new(out_features, FP32, "row scales")]
        del scales
        narrow = tape.new(g.numel, size, label + " gradient, input's type") if g.itemsize != size else None
        gx = tape.new(numel_x, size, label + " input gradient")
        ops.matmul_workspace("backward", lt=False)
        del narrow, weight, g
        return [gx]

    node = tape.node([x], backward)
    run = _int8_on_gpu if tape.trace.on_device_kernels else _int8_on_cpu
    y = run(ops, x, w, rows, label)
    if node is not None:
        _keep_as_attribute(node, x)
    y.node = node
    return y


def _int8_on_gpu(ops: Ops, x: Tensor, w: Parameter, rows: int, label: str) -> Tensor:
    """int8_vectorwise_quant of fp16(x), int8_linear_matmul to int32, int8_mm_dequant to fp16, then x's type."""
    out_features, is_fp16 = w.shape[0], ops.half_is_fp16 and x.itemsize == BF16
    half = ops.new(0 if is_fp16 else x.numel, BF16, label + " input, fp16")
    scales = ops.new(rows, FP32, label + " input row maxima")
    codes = ops.new(x.numel, 1, label + " input, int8")
    del half
    product = ops.new(rows * out_features, FP32, label + ", int32")
    if w.shape[1] % 4:  # cuBLASLt refuses: torch.matmul(B.float(), A.float().t()).to(torch.int32), copied to the output
        wide = [ops.new(n, FP32, label + " int8 operand, fp32") for n in (x.numel, w.numel)]
        result = ops.new(rows * out_features, FP32, label + " int8 product, fp32")
        ops.matmul_workspace("forward", lt=False)
        while wide:
            wide.pop(0)
        result = ops.new(rows * out_features, FP32, label + ", int32")
        del result
    out16 = ops.new(rows * out_features, BF16, label + ", fp16")
    y = out16 if is_fp16 else ops.new(rows * out_features, x.itemsize, label)
    del product, out16, codes, scales
    return y


def _int8_on_cpu(ops: Ops, x: Tensor, w: Parameter, rows: int, label: str) -> Tensor:
    """MatMul8bitFp: the weight dequantized into x's type, then a Linear."""
    assert w.quantized is not None
    weight = ops.new(w.quantized.numel, x.itemsize, f"dequantized {w.name}")
    scales = ops.new(w.shape[0], FP32, "row scales")
    del scales
    amp = ops.amp if ops.amp is not None else x.itemsize
    held = []
    if amp != x.itemsize:
        held = [
            ops.new(w.quantized.numel, amp, f"dequantized {w.name}, autocast copy")
        ]  # of a C++ call, the last first
        held.append(ops.new(x.numel, amp, label + " input, autocast copy"))
    y = ops.kept_or(rows * w.shape[0], amp, label)  # F.linear in plain sight: a selective policy keeps it
    held.clear()
    del weight
    return y


def _keep_as_attribute(node: Node, x: Tensor) -> None:
    if x.storage.category is MemoryCategory.TEMPORARIES:
        x.storage.move(MemoryCategory.ACTIVATIONS)
    node.attributes = [x.view()]
