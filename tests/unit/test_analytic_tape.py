"""The symbolic autograd engine follows PyTorch's lifetimes: small graphs worked out by hand."""

from __future__ import annotations

import pytest

from lab.analytic.accumulator import Accumulator
from lab.analytic.ops import Ops, Parameter
from lab.analytic.tape import ALLOC, FREE, Node, Tape, Tensor, Trace
from lab.analytic.timeline import totals
from lab.vocab import MemoryCategory


def make(on_gpu: bool = True) -> Tape:
    return Tape(Trace(alignment=1, on_gpu=on_gpu))


def leaf(tape: Tape, name: str, *shape: int) -> Parameter:
    numel = 1
    for n in shape:
        numel *= n
    return Parameter(name, shape, tape.new(numel, 4, name, MemoryCategory.PARAMETERS), Accumulator(name))


def live_bytes(tape: Tape) -> int:
    curve = totals(tape.trace.events)
    return curve[-1] if curve else 0


def test_a_storage_is_freed_with_its_last_reference() -> None:
    tape = make()
    x = tape.new(10, 4, "x")
    y = x.view(5)
    del x
    assert live_bytes(tape) == 40
    del y
    assert live_bytes(tape) == 0
    assert [e[0] for e in tape.trace.events] == [ALLOC, FREE]


def test_sizes_are_rounded_up_to_the_alignment() -> None:
    tape = Tape(Trace(alignment=512))
    held = [tape.new(1, 4, "scalar"), tape.new(129, 4, "over")]
    assert live_bytes(tape) == 512 + 1024
    del held


def test_linear_keeps_input_and_weight_and_leaves_a_gradient() -> None:
    tape = make()
    ops = Ops(tape)
    w = leaf(tape, "w", 3, 5)  # 60 B
    source = Accumulator("x")
    x = Tensor(tape.new(2 * 5, 4, "x").storage, 10, 4, source)  # 40 B, needs a gradient
    y = ops.linear(x, w, None, 2, "y")  # 24 B
    del x
    assert live_bytes(tape) == 60 + 40 + 24  # the input lives on: saved for backward
    loss = ops.scale(y, "loss")
    del y
    assert live_bytes(tape) == 60 + 40 + 24
    tape.backward(loss)
    del loss
    assert w.accumulator.grad is not None
    assert w.accumulator.grad.storage.category is MemoryCategory.GRADIENTS
    # weight, its gradient and the input's gradient (10 elements)
    assert live_bytes(tape) == 60 + 60 + 40


def test_a_second_gradient_is_added_in_place() -> None:
    tape = make()
    ops = Ops(tape)
    w = leaf(tape, "w", 4, 4)
    for _ in range(2):
        x = Tensor(tape.new(4, 4, "x").storage, 4, 4)
        tape.backward(ops.linear(x, w, None, 1, "y"))
        del x
    assert live_bytes(tape) == 64 + 64


@pytest.mark.parametrize(("on_gpu", "peak_extra"), [(True, 0), (False, 40)])
def test_residual_gradients_add_in_place_only_without_a_dispatch_mode(on_gpu: bool, peak_extra: int) -> None:
    """x + f(x): both paths' gradients meet at x. Out of place under a mode (the CPU stand-in)."""
    tape = make(on_gpu)
    ops = Ops(tape)
    first = ops.unary(Tensor(tape.new(10, 4, "x").storage, 10, 4, Accumulator("x")), "first", False, "g0")
    y = ops.unary(first, "y", True, "gy")
    out = ops.add(first, y, "residual")
    loss = ops.scale(out, "loss")
    del first, y, out
    before = len(tape.trace.events)
    tape.backward(loss)
    made = [e for e in tape.trace.events[before:] if e[0] == ALLOC]
    # loss gradient, the residual's, y's, (the sum,) the first operation's
    assert sum(e[2] for e in made) == 4 + 40 + 40 + peak_extra + 40


def test_nodes_run_newest_first_and_drop_what_they_kept() -> None:
    tape = make()
    ran: list[str] = []

    def node(name: str, inputs: list[Tensor], keep: list[Tensor]) -> Tensor:
        count = len(inputs)

        def backward(grads):  # type: ignore[no-untyped-def]
            ran.append(f"{name}:{live_bytes(tape)}")
            return [grads[0]] * count

        out = tape.new(1, 4, name)
        out.node = Node(tape, inputs, backward, keep)
        return out

    start = node("start", [Tensor(tape.new(1, 4, "leaf").storage, 1, 4, Accumulator("leaf"))], [])
    saved = tape.new(25, 4, "saved")
    a = node("a", [start], [saved])
    del saved
    b = node("b", [start], [])
    top = node("top", [a, b], [])
    del start, a, b
    assert live_bytes(tape) == 104  # saved and the root alone
    tape.backward(top)
    assert [r.split(":")[0] for r in ran] == ["top", "b", "a", "start"]
    assert ran[2] == "a:108"  # the 100 B are still kept while a runs, with the root and the loss gradient
    assert ran[3] == "start:12"  # root, loss gradient (held by the caller), incoming sum
