"""Gradients of a block's parameters that came together: one thing, until somebody asks for one of them.

A recorded block's backward (``lab.analytic.layers``) makes them at known places, and mostly they also go together:
at zero_grad, or when a strategy has reduced them. Then nobody needs a tensor for each.
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.analytic.accumulator import Accumulator
from lab.analytic.layer_instructions import Value
from lab.analytic.segments import Segment
from lab.analytic.tape import FREE, Tensor, Trace


class Kept:
    """What they are like, in blocks of one kind. ``values``: in the model's order, as ``module`` was recorded."""

    def __init__(self, values: Sequence[Value], module: str) -> None:
        self.values, self.module = values, module
        self._freed: dict[range, Segment] = {}

    def freed(self, which: range) -> Segment:
        """Some of them going, in this order."""
        if which not in self._freed:
            of = [self.values[i] for i in which]
            self._freed[which] = Segment([(FREE, v.ident, v.size, v.category, v.label, 0) for v in of], self.module)
        return self._freed[which]


class KeptTogether:
    """One block's: its storages are numbered from ``first``; ``accumulators``: the parameters', in the same order."""

    __slots__ = ("accumulators", "first", "kind", "module", "trace")

    def __init__(self, trace: Trace, kind: Kept, first: int, module: str, accumulators: list[Accumulator]) -> None:
        self.trace, self.kind, self.first, self.module, self.accumulators = trace, kind, first, module, accumulators
        for accumulator in accumulators:
            accumulator.together = self

    def tensor(self, index: int) -> Tensor:
        """One of them by itself; whoever asks owns it."""
        return self.kind.values[index].adopt(self.trace, self.first, self._labels[index])

    @property
    def _labels(self) -> list[str]:
        return self.kind.freed(range(len(self.accumulators))).labels(self.module)

    def take_apart(self) -> None:
        """Every one to its accumulator."""
        trace, first = self.trace, self.first
        for accumulator, value, label in zip(self.accumulators, self.kind.values, self._labels, strict=True):
            accumulator.together = None
            accumulator.own = value.adopt(trace, first, label)

    def free(self, which: range) -> None:
        """Let go of these, in this order; of others whoever has asked for them is the owner."""
        self._leave()
        self.kind.freed(which).play(self.trace, self.first, self.module)

    def _leave(self) -> None:
        for accumulator in self.accumulators:
            accumulator.together = None


def let_go(accumulators: Sequence[Accumulator]) -> None:
    """Their gradients go, from the first to the last."""
    begin = 0
    while begin < len(accumulators):
        group = group_at(accumulators, begin)
        if group is None:
            accumulators[begin].own = None
            begin += 1
        else:
            begin += len(group.accumulators)
            group.free(range(len(group.accumulators)))


def let_go_of_list(accumulators: Sequence[Accumulator], keep_last: bool) -> Tensor | None:
    """As a list of them that is cleared, from the last to the first; with ``keep_last`` the last is given instead."""
    group = group_at(accumulators, 0) if accumulators else None
    if group is not None and len(group.accumulators) == len(accumulators):
        last = group.tensor(len(accumulators) - 1) if keep_last else None
        group.free(range(len(accumulators) - (2 if keep_last else 1), -1, -1))
        return last
    grads = [a.grad for a in accumulators]
    for accumulator in accumulators:
        accumulator.own = None
    last = next((g for g in reversed(grads) if g is not None), None) if keep_last else None
    grads.clear()
    return last


def group_at(accumulators: Sequence[Accumulator], begin: int) -> KeptTogether | None:
    """Those that came together and that are the next in ``accumulators``, all of them in their order.

    None: the next one's gradient is by itself from here on, or there is none.
    """
    group = accumulators[begin].together
    if group is not None:
        if accumulators[begin : begin + len(group.accumulators)] == group.accumulators:
            return group
        group.take_apart()
    return None
