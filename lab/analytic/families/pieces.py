"""Operations of transformers' modeling code, as its Python lines make and drop them.

Each mirrors one function there (transformers 5.23; 5.17 has the same lines unless a rule says otherwise). A gradient
whose operand has another type is made in the result's type and then cast (engine.cpp, validate_outputs).
"""

from __future__ import annotations

from lab.analytic.ops import LOSS, Ops, Parameter
from lab.analytic.tape import FP32, INT64, Grads, Node, Tensor

CUBE = 3


def _pass(grads: Grads) -> Grads:
    return [grads[0]]


def times_constant(ops: Ops, x: Tensor, constant: Tensor, label: str) -> Tensor:
    """x * constant, in the wider type; keeps the constant."""
    numel, size, back, tape = x.numel, max(x.itemsize, constant.itemsize), x.itemsize, ops.tape

    def backward(grads: Grads) -> Grads:
        return [tape.new(numel, size, label + " gradient")]

    def validate(outputs: Grads) -> None:
        outputs[0] = tape.new(numel, back, label + " gradient")

    node = tape.node([x], backward, [constant], validate=validate if back != size else None)
    y = ops.new(numel, size, label)
    y.node = node
    return y


def reshaped(ops: Ops, x: Tensor, label: str) -> Tensor:
    """A view whose gradient comes transposed, so that its reshape copies it."""
    numel, size, tape = x.numel, x.itemsize, ops.tape
    return x.view(node=tape.node([x], lambda _: [tape.new(numel, size, label + " gradient, contiguous")]))


def _half(ops: Ops, x: Tensor, label: str) -> Tensor:
    """x[..., :half] or x[..., half:]: a view; backward puts its gradient into zeros of x's size."""
    numel, size, tape = x.numel, x.itemsize, ops.tape
    return x.view(numel // 2, tape.node([x], lambda _: [tape.new(numel, size, label + " half gradient")]))


def rotate_half(ops: Ops, x: Tensor, label: str) -> Tensor:
    """torch.cat((-x2, x1), dim=-1)."""
    half, tape = x.numel // 2, ops.tape
    first, second = _half(ops, x, label), _half(ops, x, label)
    negated = ops.unary(second, label + " negated half", False, label + " negated half gradient")

    def backward(grads: Grads) -> Grads:
        g = grads[0]
        assert g is not None
        return [g.view(half), g.view(half)]

    node = tape.node([negated, first], backward)
    out = ops.new(x.numel, x.itemsize, label + " rotated")
    out.node = node
    return out


def apply_rotary(ops: Ops, x: Tensor, cos: Tensor, sin: Tensor, label: str) -> Tensor:
    """(x * cos) + (rotate_half(x) * sin). Wider tables (fp32 under autocast) make a wider result."""
    a = times_constant(ops, x, cos, label + " cos product")
    rotated = rotate_half(ops, x, label)
    b = times_constant(ops, rotated, sin, label + " sin product")
    del rotated
    return ops.add(a, b, label)


def _rstd(ops: Ops, wide: Tensor, rows: int, label: str, named: list[Tensor]) -> Tensor:
    """rsqrt(wide.pow(2).mean(-1) + eps). Keeps wide and the result. ``named[0]`` becomes the mean, if a variable is."""
    tape, numel = ops.tape, wide.numel

    def pow_backward(grads: Grads) -> Grads:  # grad * (2 * x ** 1)
        power = tape.new(numel, FP32, label + " x")
        doubled = tape.new(numel, FP32, label + " 2 x")
        g = tape.new(numel, FP32, label + " square gradient")
        del doubled, power
        return [g]

    def rsqrt_backward(grads: Grads) -> Grads:  # -0.5 * grad * result ** 3
        cubed = tape.new(rows, FP32, label + " rstd gradient")
        scaled = tape.new(rows, FP32, label + " rstd gradient")
        g = tape.new(rows, FP32, label + " rstd gradient")
        del scaled, cubed
        return [g]

    node = tape.node([wide], pow_backward, [wide])
    square = tape.new(numel, FP32, label + " square")
    square.node = node
    node = tape.node([square], lambda _: [tape.new(numel, FP32, label + " mean gradient")])
    mean = tape.new(rows, FP32, label + " mean square")
    mean.node = node
    del square
    if named:
        named[0] = mean
    shifted = tape.new(rows, FP32, label + " mean square")
    shifted.node = tape.node([mean], _pass)
    del mean
    rstd = tape.new(rows, FP32, label + " rstd")
    rstd.node = tape.node([shifted], rsqrt_backward, [rstd])
    del shifted, node
    return rstd


def _normalised(ops: Ops, wide: Tensor, rstd: Tensor, rows: int, label: str) -> Tensor:
    """wide * rstd, both kept; rstd's gradient is a whole product before it is summed per row."""
    tape, numel = ops.tape, wide.numel

    def backward(grads: Grads) -> Grads:
        product = tape.new(numel, FP32, label + " rstd gradient product")
        gx = tape.new(numel, FP32, label + " gradient")
        g = tape.new(rows, FP32, label + " rstd gradient")
        del product
        return [gx, g]

    node = tape.node([wide, rstd], backward, [rstd, wide])
    normal = tape.new(numel, FP32, label + " normalised")
    normal.node = node
    return normal


def _scaled(
    ops: Ops, x: Tensor, weight: Tensor, rows: int, label: str, keep: Parameter | None, weight_first: bool = True
) -> Tensor:
    """weight * x; the weight's gradient is a whole product before its columns are summed.

    ``weight_first``: the weight is the product's first argument (``self``), else x is. MulBackward0 computes and keeps
    in the order of the names, other before self; what the engine then sums goes by the arguments' order.
    """
    tape, numel, size, hidden = ops.tape, x.numel, max(x.itemsize, weight.itemsize), weight.numel
    back, needs_x, needs_w = x.itemsize, x.node is not None, weight.node is not None
    back_w = weight.itemsize

    def of_x() -> Tensor | None:
        return tape.new(numel, size, label + " gradient") if needs_x else None

    def of_weight() -> Tensor | None:
        return tape.new(numel, size, label + " weight gradient product") if needs_w else None

    def backward(grads: Grads) -> Grads:
        if weight_first:
            gx, gw = of_x(), of_weight()
        else:
            gw, gx = of_weight(), of_x()
        return [gx, gw]

    def validate(outputs: Grads) -> None:
        if needs_w:
            gw = tape.new(hidden, size, f"gradient of {label} weight")
            ops.column_sum(rows, hidden)
            outputs[1] = gw
            if back_w != size:
                outputs[1] = tape.new(hidden, back_w, f"gradient of {label} weight")
        if needs_x and back != size:  # only a weight that is first has a narrower x
            outputs[0] = tape.new(numel, back, label + " gradient")

    kept = [x if needs_w else None, weight if needs_x and keep is None else None]
    node = tape.node([x, weight], backward, kept if weight_first else kept[::-1], validate=validate)
    del kept
    if keep is not None and needs_x:
        if ops.linear_keeps_parameter:
            ops.keep_parameter(node, keep)
        elif node is not None:
            tape.save(node, weight)
    y = tape.new(numel, size, label)
    y.node = node
    return y


def rmsnorm(ops: Ops, x: Tensor, w: Parameter, rows: int, label: str) -> Tensor:
    """LlamaRMSNorm.forward: fp32 x, x * rstd; cast back; times the weight."""
    size = x.itemsize
    wide = ops.cast(x, FP32, label + " input, fp32")
    variance = [wide]
    rstd = _rstd(ops, wide, rows, label, variance)
    normal = _normalised(ops, wide, rstd, rows, label)
    del wide, rstd
    narrow = ops.cast(normal, size, label + " normalised")
    out = _scaled(ops, narrow, w.leaf(), rows, label, w)
    del narrow
    del normal, variance  # hidden_states, variance: local variables
    return out


def gemma_rmsnorm(ops: Ops, x: Tensor, w: Parameter, rows: int, label: str) -> Tensor:
    """GemmaRMSNorm.forward: (x.float() normalised * (1.0 + weight.float())).type_as(x)."""
    wide = ops.cast(x, FP32, label + " input, fp32")
    rstd = _rstd(ops, wide, rows, label, [])
    normal = _normalised(ops, wide, rstd, rows, label)
    del wide, rstd
    weight = ops.cast(w.leaf(), FP32, f"{label} weight, fp32")
    shifted = ops.new(w.numel, FP32, f"{label} weight plus one")
    shifted.node = ops.tape.node([weight], _pass)
    del weight
    out = _scaled(ops, normal, shifted, rows, label, None, weight_first=False)
    del normal, shifted
    return ops.cast(out, x.itemsize, label)


def gelu_new(ops: Ops, x: Tensor) -> Tensor:
    """NewGELUActivation: 0.5 * x * (1.0 + tanh(sqrt(2 / pi) * (x + 0.044715 * pow(x, 3.0)))).

    Keeps 0.5 x, x (for the cube), tanh and 1 + tanh. ``pow`` is on CUDA autocast's fp32 list (autocast_mode.h), so
    there the rest is fp32 too, the result included.
    """
    tape, numel, label = ops.tape, x.numel, "gelu"

    def cube_backward(grads: Grads) -> Grads:  # grad * (3 * x ** 2)
        power = tape.new(numel, wide_size, label + " square")
        tripled = tape.new(numel, wide_size, label + " 3 square")
        g = tape.new(numel, wide_size, label + " gradient")
        del tripled, power
        return [g]

    half_x = ops.unary(x, label + " half x", False, label + " gradient")
    wide_size = FP32 if ops.amp is not None and tape.trace.on_device_kernels else x.itemsize
    wide = ops.cast(x, wide_size, label + " input, fp32")
    node = tape.node([wide], cube_backward, [wide])
    cube = ops.new(numel, wide_size, label + " cube")
    cube.node = node
    del wide
    scaled = ops.scale(cube, label + " scaled cube")
    del cube
    inner = ops.add(x, scaled, label + " inner sum")
    del scaled
    argument = ops.scale(inner, label + " argument")
    del inner
    tanh = ops.new(numel, wide_size, label + " tanh")
    tanh.node = tape.node([argument], lambda _: [tape.new(numel, wide_size, label + " tanh gradient")], [tanh])
    del argument
    shifted = ops.new(numel, wide_size, label + " 1 + tanh")
    shifted.node = tape.node([tanh], _pass)
    del tanh, node
    return product(ops, half_x, shifted, label)


def product(ops: Ops, x: Tensor, y: Tensor, label: str) -> Tensor:
    """x * y of possibly different types, both kept; y's gradient is made first."""
    numel, size, tape = x.numel, max(x.itemsize, y.itemsize), ops.tape
    backs, needs = (x.itemsize, y.itemsize), [t.node is not None for t in (x, y)]

    def backward(grads: Grads) -> Grads:
        gy, gx = (tape.new(numel, size, label + " gradient") if need else None for need in reversed(needs))
        return [gx, gy]

    def validate(outputs: Grads) -> None:
        for i, back in enumerate(backs):
            if needs[i] and back != size:
                outputs[i] = tape.new(numel, back, label + " gradient")

    saved = [y if needs[0] else None, x if needs[1] else None]
    node = tape.node([x, y], backward, saved, validate=validate)
    del saved
    out = ops.new(numel, size, label)
    out.node = node
    return out


def conv1d(ops: Ops, x: Tensor, w: Parameter, b: Parameter, rows: int, label: str) -> Tensor:
    """pytorch_utils.Conv1D: torch.addmm(bias, x, weight [in, out]). Backward: input, weight, bias."""
    tape, (in_features, out_features), numel_x = ops.tape, w.shape, x.numel
    weight = ops.weight(w)
    if ops.amp is not None:
        x = ops.cast(x, ops.amp, label + " input, autocast copy")
    bias = ops.weight(b)
    size, needs_x = x.itemsize, x.node is not None
    needs_w, needs_b = weight.node is not None, bias.node is not None

    def backward(grads: Grads) -> Grads:
        gx = tape.new(numel_x, size, label + " input gradient") if needs_x else None
        gw = tape.new(out_features * in_features, size, f"gradient of {w.name}") if needs_w else None
        ops.matmul_workspace("backward", lt=False)
        return [gx, gw, None]

    def validate(outputs: Grads) -> None:  # the output's gradient, summed to the bias
        outputs[2] = tape.new(out_features, size, f"gradient of {b.name}")
        ops.column_sum(rows, out_features)

    swaps = ops.linear_keeps_parameter  # ZeRO-3: autograd keeps the parameter, not its storage of the moment
    kept = [x if needs_w else None, weight if needs_x and not swaps else None]
    node = tape.node([x, weight, bias], backward, kept, validate=validate if needs_b else None)
    del kept
    if swaps and needs_x:
        ops.keep_parameter(node, w)
    y = ops.kept_or(rows * out_features, size, label)
    if not ops.taken_back:
        ops.matmul_workspace("forward", lt=True)
    y.node = node
    del weight, bias  # autocast copies of frozen ones live until addmm returns
    return y


def causal_lm_loss(ops: Ops, logits: Tensor, batch: int, rows: int, counted: bool = False) -> Tensor:
    """ForCausalLMLoss (loss/loss_utils.py): logits.float(), labels padded by one and shifted, mean cross entropy.

    Keeps the log-softmax and the shifted labels. The caller's logits live on, and so do the fp32 ones, until the
    loss is there.
    """
    tape, numel = ops.tape, logits.numel
    wide = ops.cast(logits, FP32, "logits, fp32")
    padded = ops.new(rows + batch, INT64, "padded labels")
    # labels[..., 1:].contiguous(): of one sequence it is contiguous as it is.
    shifted = ops.new(rows, INT64, "shifted labels") if batch > 1 else padded
    node = tape.node([wide], lambda _: [tape.new(numel, FP32, "logits gradient", LOSS)])
    log_softmax = ops.new(numel, FP32, "log-softmax", LOSS)
    if node is not None:
        tape.save(node, log_softmax)
    log_softmax.node = node
    nll: Node | None = tape.node(
        [log_softmax], lambda _: [tape.new(numel, FP32, "log-softmax gradient", LOSS)], [log_softmax, shifted]
    )
    loss = ops.new(1, FP32, "loss", LOSS)
    if nll is not None:
        tape.save(nll, ops.new(1, FP32, "total weight", LOSS))
    loss.node = nll
    if counted:  # fixed_cross_entropy: the sum over num_items_in_batch
        loss = ops.scale(loss, "loss over items")
    del wide, padded, shifted
    return loss
