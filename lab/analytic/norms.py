"""RMSNorm where no fused kernel exists: PyTorch 2.13 on the CPU composes it of five operations.

Source: aten/src/ATen/native/layer_norm.cpp, rms_norm_composite (CUDA has _fused_rms_norm since 2.9, in
``Ops.norm``): x.float(); rsqrt(mean(x^2) + eps); x * that; * weight; back to x's type. It keeps the fp32 x, the
fp32 x * rstd and the rows' rstd, where the fused kernel keeps x and rstd.
"""

from __future__ import annotations

from lab.analytic.ops import Ops, Parameter
from lab.analytic.tape import FP32, Grads, Tensor


def rmsnorm_composite(ops: Ops, x: Tensor, w: Parameter, rows: int, label: str) -> Tensor:
    """Keeps x in fp32 (twice referenced, once stored), x * rstd and rstd."""
    tape, numel, size, hidden = ops.tape, x.numel, x.itemsize, w.numel
    wide = ops.cast(x, FP32, label + " input, fp32")

    def pow_backward(grads: Grads) -> Grads:  # grad * (2 * x ** 1), one C++ expression: both stay until it ends
        power = tape.new(numel, FP32, label + " x")
        doubled = tape.new(numel, FP32, label + " 2 x")
        g = tape.new(numel, FP32, label + " square gradient")
        del power, doubled
        return [g]

    square = tape.new(numel, FP32, label + " square")
    square.node = tape.node([wide], pow_backward, [wide])
    mean = tape.new(rows, FP32, label + " mean square")
    mean.node = tape.node([square], lambda _: [tape.new(numel, FP32, label + " mean gradient")])
    del square
    rstd = tape.new(rows, FP32, label + " rstd")
    node = tape.node([mean], lambda _: [tape.new(rows, FP32, label + " rstd gradient")])
    tape.save(node, rstd)
    rstd.node = node
    del mean, node

    def normalise_backward(grads: Grads) -> Grads:  # for rstd: a full product, then its sum per row
        product = tape.new(numel, FP32, label + " rstd gradient product")
        gx = tape.new(numel, FP32, label + " gradient")
        g = tape.new(rows, FP32, label + " rstd gradient")
        del product
        return [gx, g]

    node = tape.node([wide, rstd], normalise_backward, [wide, rstd])
    normal = tape.new(numel, FP32, label + " normalised")
    normal.node = node
    del rstd, node

    def scale_backward(grads: Grads) -> Grads:  # in the order of the arguments' names: other, the weight, before self
        product = tape.new(numel, FP32, label + " weight gradient product") if w.trainable else None
        gx = tape.new(numel, FP32, label + " gradient") if needs_x else None
        if product is None:
            return [gx, None]
        summed = tape.new(hidden, FP32, f"gradient of {label} weight")
        del product
        gw = summed if w.tensor.itemsize == FP32 else tape.new(hidden, w.tensor.itemsize, f"gradient of {label} weight")
        del summed
        return [gx, gw]

    needs_x = normal.node is not None
    node = tape.node([normal, w.leaf()], scale_backward, [normal if w.trainable else None])
    ops.keep_parameter(node, w)
    out = tape.new(numel, FP32, label)
    out.node = node
    del normal, node, wide
    return ops.cast(out, size, label)
