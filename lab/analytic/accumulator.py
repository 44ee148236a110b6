"""AccumulateGrad (torch/csrc/autograd/functions/accumulate_grad.cpp): where a parameter's gradient comes and stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lab.analytic.tape import Grads, Node, Tensor
from lab.vocab import MemoryCategory

if TYPE_CHECKING:
    from lab.analytic.gradients import KeptTogether

_NOTHING: list[Any] = []


class Accumulator(Node):
    """AccumulateGrad of one parameter: takes its gradient over, then calls ``on_grad`` with the parameter's name.

    ``own``: the gradient; ``together``: where it is kept instead until somebody asks for it by itself.
    """

    is_leaf = True
    __slots__ = ("name", "on_grad", "own", "together")

    def __init__(self, name: str) -> None:
        self.name = name
        self.seq = 1 << 62  # UINT64_MAX there: runs as soon as it is ready
        self.edges = self.saved = _NOTHING
        self.unpack = self.validate = self.buffer = self.hooks = self.attributes = None
        self.num_slots, self.deps = 1, 0
        self.own: Tensor | None = None
        self.together: KeptTogether | None = None
        self.on_grad: Callable[[str], None] | None = None

    @property
    def grad(self) -> Tensor | None:
        if self.together is not None:
            self.together.take_apart()
        return self.own

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        if self.together is not None:
            self.together.take_apart()
        self.own = grad

    @property
    def has_grad(self) -> bool:
        """Without taking it apart from others."""
        return self.own is not None or self.together is not None

    def backward(self, grads: Grads) -> Grads:
        if self.grad is None:
            grad = grads[0]
            assert grad is not None
            grad.storage.move(MemoryCategory.GRADIENTS)
            self.grad = grad.view()
            del grad
        grads[0] = None
        if self.on_grad is not None:
            self.on_grad(self.name)
        return []
