"""Cross entropy on the analytic side: ``lab.model.loss`` over symbolic tensors."""

from __future__ import annotations

from lab.analytic.ops import LOSS, Ops
from lab.analytic.tape import FP32, Grads, Tensor


def cross_entropy(ops: Ops, logits: Tensor) -> Tensor:
    """F.cross_entropy of fp32 logits: keeps the log-softmax (and the batch's targets).

    Backward: the log-softmax's gradient is a full fp32 matrix, and so is the logits'.
    """
    numel, tape = logits.numel, ops.tape
    node = tape.node([logits], lambda _: [tape.new(numel, FP32, "logits gradient", LOSS)])
    log_softmax = ops.new(numel, FP32, "log-softmax", LOSS)
    ops.tape.save(node, log_softmax)
    log_softmax.node = node
    return _nll_loss(ops, log_softmax)


def _nll_loss(ops: Ops, log_softmax: Tensor) -> Tensor:
    """A frame of its own: where a recomputation ends at its last saved tensor, the loss goes before the logits."""
    numel, tape = log_softmax.numel, ops.tape
    nll = tape.node([log_softmax], lambda _: [tape.new(numel, FP32, "log-softmax gradient", LOSS)], [log_softmax])
    loss = ops.new(1, FP32, "loss", LOSS)
    ops.tape.save(nll, ops.new(1, FP32, "total weight", LOSS))
    loss.node = nll
    return loss


def cross_entropy_without_upcast(ops: Ops, logits: Tensor, rows: int) -> Tensor:
    """lab.model.loss: the log-softmax and its gradient in the logits' type, one column of it picked per token.

    Backward: gather's gradient is a full matrix of zeros with one number per row, and so is the logits'. Where
    PyTorch's dispatcher is watched, as on a CPU here, numbers go into a copy (FunctionsManual.cpp: gather_backward).
    """
    numel, size, tape = logits.numel, logits.itemsize, ops.tape
    node = tape.node([logits], lambda _: [tape.new(numel, size, "logits gradient", LOSS)])
    log_softmax = ops.new(numel, size, "log-softmax", LOSS)
    tape.save(node, log_softmax)
    log_softmax.node = node

    def gather_backward(grads: Grads) -> Grads:
        zeros = tape.new(numel, size, "log-softmax gradient", LOSS)
        return [zeros if tape.trace.on_device_kernels else tape.new(numel, size, "log-softmax gradient", LOSS)]

    gather = tape.node([log_softmax], gather_backward, [log_softmax])
    picked = ops.new(rows, size, "loss per token", LOSS)
    picked.node = gather
    wide = ops.cast(picked, FP32, "loss per token, fp32")
    mean = ops.new(1, FP32, "loss", LOSS)
    mean.node = tape.node([wide], lambda _: [tape.new(rows, FP32, "loss per token gradient", LOSS)])
    del wide
    loss = ops.new(1, FP32, "loss", LOSS)
    loss.node = tape.node([mean], lambda _: [tape.new(1, FP32, "loss gradient")])
    return loss


def in_place_cross_entropy(ops: Ops, logits: Tensor, rows: int) -> Tensor:
    """lab.model.loss.InPlaceCrossEntropy: keeps the log-softmax, which becomes fp32 logits' gradient itself.

    Backward: a column of fp32 ones, two scalars, and for half-precision logits a gradient of their type.
    """
    numel, size, tape = logits.numel, logits.itemsize, ops.tape
    wide = ops.cast_alone(logits, FP32, "logits, fp32")
    log_softmax = ops.new(numel, FP32, "log-softmax", LOSS)
    del wide
    kept: list[Tensor] = []  # what ctx.saved_tensors gives the backward

    def backward(grads: Grads) -> Grads:
        source = kept.pop()
        ones = ops.new(rows, FP32, "loss one-hot column", LOSS)
        scale = ops.new(1, FP32, "loss scale factor", LOSS)
        gradient = source.view() if size == FP32 else ops.new(numel, size, "logits gradient", LOSS)
        del ones, scale, source
        return [gradient]

    total_weight = ops.new(1, FP32, "total weight", LOSS)
    loss = ops.new(1, FP32, "loss", LOSS)
    del total_weight
    node = tape.node([logits], backward, [log_softmax])
    kept.append(log_softmax)
    loss.node = node
    return loss
