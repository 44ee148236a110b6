"""DoRA (Liu 2024) beside a frozen Linear, as peft computes it: what its forward takes, and what backward keeps of it.

Source: peft 0.21, tuners/lora/layer.py (Linear.forward), variants.py (DoraLinearVariant.forward), dora.py
(DoraLinearLayer.forward, get_lora_weight, get_weight_norm). The result is

    base(x) + (m / |W + BA| - 1) * W x + m / |W + BA| * B A x * alpha / rank

with m [out] trained and the norms of rows [out] taken for constants. B A is the adapter applied to an identity
[in, in]: a graph of its own, which nothing runs backward and which stays until the layer returns. Without dropout W x
is the base's output less its bias; with dropout it is a second product, of the dropped-out input.

On a GPU norms of a Linear's rows need no scratch memory: Reduce.cuh splits a row over thread blocks from 131072
elements on. A Conv1D's weight lies the other way round, so that its norms go down columns, with partial ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab.analytic.accumulator import Accumulator
from lab.analytic.ops import Ops, Parameter
from lab.analytic.tape import Grads, Tensor, viewed
from lab.vocab import MemoryCategory

MAGNITUDE = ".lora_magnitude_vector"


@dataclass
class DoraLayer:
    """One target: its parameters, and its adapter's two Linears as (x, rows, label)."""

    weight: Parameter  # [out, in] (Conv1D: [in, out]), frozen
    bias: Parameter | None
    magnitude: Parameter  # [out]
    down: Callable[[Tensor, int, str], Tensor]
    up: Callable[[Tensor, int, str], Tensor]
    in_features: int
    rows: int
    itemsize: int  # of the adapter's weights
    label: str
    dropout: float
    transposed: bool  # Conv1D: the weight is [in, out]
    as_rows: Callable[[Tensor], Tensor]  # what stands between a product's rows and what the layer returns

    @property
    def out_features(self) -> int:
        return self.magnitude.shape[0]


def dora(ops: Ops, layer: DoraLayer, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The adapted Linear of x [rows, in], in the type of base(x). Local variables live as peft's do."""
    result = base(x)
    size_out = result.itemsize
    x = ops.cast(x, layer.itemsize, layer.label + " adapter input, fp32")
    result = _variant(ops, layer, x, result)
    return ops.cast(result, size_out, layer.label + " adapted, base's type")


def _variant(ops: Ops, layer: DoraLayer, x: Tensor, result: Tensor) -> Tensor:
    if layer.dropout:
        x = ops.dropout(x, layer.label + " adapter dropout")
        update = _update(ops, layer, x, None)
    else:
        update = _update(ops, layer, x, result)
    return ops.add(result, update, layer.label + " adapted")


def _update(ops: Ops, layer: DoraLayer, x: Tensor, product: Tensor | None) -> Tensor:
    """DoraLinearLayer.forward: what is added to the base's output. ``product``: that output, None with dropout."""
    name, rows, size = layer.weight.name, layer.rows, x.itemsize
    delta = _low_rank_weight(ops, layer)  # with its graph, up to the return
    delta = ops.cast(delta, size, f"DoRA update of {name}, input's type")
    weight = ops.cast(layer.weight.leaf(), size, f"DoRA base of {name}, input's type")
    norm = _row_norms(ops, layer, weight)
    ratio = _ratio(ops, layer.magnitude, norm, f"DoRA ratio of {name}")
    low = layer.up(layer.down(x, rows, f"{layer.label} adapter A"), rows, f"{layer.label} adapter B")
    if product is None:
        plain = _operand(ops, layer, weight)
        product = layer.as_rows(ops.linear(x, plain, None, rows, f"DoRA product of {name}"))
        del plain
    elif layer.bias is not None:
        product = ops.add(product, layer.bias.leaf(), f"DoRA product of {name}, without bias", broadcast=True)
    less = _minus_one(ops, ratio, f"DoRA ratio less one of {name}")
    first = _times_row(ops, less, product, rows, f"DoRA base term of {name}")
    del less
    second = _times_row(ops, ratio, low, rows, f"DoRA adapter term of {name}")
    scaled = ops.scale(second, f"DoRA scaled term of {name}")
    del second
    return ops.add(first, scaled, f"DoRA sum of terms of {name}")


def _operand(ops: Ops, layer: DoraLayer, weight: Tensor) -> Parameter:
    """transpose(weight, fan_in_fan_out) of peft/utils/other.py, as F.linear's second operand.

    Conv1D's weight, where it was not cast, becomes a new nn.Parameter there, which wants a gradient: nobody uses it,
    and it stays until the graph goes.
    """
    name, tape = layer.weight.name, ops.tape
    shape = (layer.out_features, layer.in_features)
    accumulator = Accumulator(name)

    def hold(_: str) -> None:
        grad, accumulator.grad = accumulator.grad, None
        assert grad is not None
        grad.storage.move(MemoryCategory.ACTIVATIONS)  # nobody's gradient
        tape.held_by_graph.append(grad)

    accumulator.on_grad = hold
    trained = layer.transposed and weight.storage is layer.weight.tensor.storage
    return Parameter(name, shape, weight, accumulator, trained)


def _low_rank_weight(ops: Ops, layer: DoraLayer) -> Tensor:
    """get_lora_weight: B(A(identity)) [in, out]."""
    name, columns = layer.weight.name, layer.in_features
    identity = ops.new(columns * columns, layer.itemsize, f"DoRA identity of {name}")
    return layer.up(layer.down(identity, columns, f"DoRA A of {name}"), columns, f"DoRA update of {name}")


def _row_norms(ops: Ops, layer: DoraLayer, weight: Tensor) -> Tensor:
    """get_weight_norm: W plus the scaled B A, then a norm per row; no graph."""
    name, numel, size = layer.weight.name, weight.numel, weight.itemsize
    scaled = ops.new(numel, size, f"DoRA scaled update of {name}")
    adapted = ops.new(numel, size, f"DoRA adapted weight of {name}")
    del scaled
    norm = ops.new(layer.out_features, size, f"DoRA norm of {name}")
    if layer.transposed:
        ops.column_sum(layer.in_features, layer.out_features)
    del adapted
    return norm


def _ratio(ops: Ops, magnitude: Parameter, norm: Tensor, label: str) -> Tensor:
    """(magnitude / norm).view(1, -1); keeps the norms."""
    numel, size, tape, name = magnitude.numel, magnitude.tensor.itemsize, ops.tape, magnitude.name
    quotient = tape.node([magnitude.leaf()], lambda _: [tape.new(numel, size, f"gradient of {name}")], [norm])
    y = ops.new(numel, size, label)
    y.node = quotient
    return y.view(node=tape.node([y], lambda grads: [viewed(grads[0])]))


def _minus_one(ops: Ops, ratio: Tensor, label: str) -> Tensor:
    """ratio - 1: the gradient passes as it is."""
    y = ops.new(ratio.numel, ratio.itemsize, label)
    y.node = ops.tape.node([ratio], lambda grads: [grads[0]])
    return y


def _times_row(ops: Ops, row: Tensor, x: Tensor, rows: int, label: str) -> Tensor:
    """row [1, out] * x [rows, out] in row's type. Keeps x, and row if x needs a gradient.

    Backward makes x's gradient and row's. Then the engine sums the latter over rows, which gives a view, and casts the
    former.
    """
    tape, columns, numel, size, narrow = ops.tape, row.numel, x.numel, max(row.itemsize, x.itemsize), x.itemsize
    needs_x = x.node is not None

    def backward(grads: Grads) -> Grads:
        gx = tape.new(numel, size, label + " gradient") if needs_x else None
        return [tape.new(numel, size, label + " gradient"), gx]

    def validate(outputs: Grads) -> None:
        summed = tape.new(columns, size, label + " summed gradient")
        ops.column_sum(rows, columns)
        outputs[0] = viewed(summed)
        if needs_x and narrow != size:
            outputs[1] = tape.new(numel, narrow, label + " gradient, narrow")

    node = tape.node([row, x], backward, [x, row if needs_x else None], validate=validate)
    y = ops.new(numel, size, label)
    y.node = node
    return y
