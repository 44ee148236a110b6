"""What a recorded block consists of: instructions, in the order in which a block of its kind carries them out.

``lab.analytic.layer_recording`` makes them, ``lab.analytic.layers`` carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lab.analytic.segments import Segment
from lab.analytic.tape import Storage, Tensor, Trace
from lab.vocab import MemoryCategory

if TYPE_CHECKING:
    from lab.analytic.gradients import Kept


class Unrecordable(Exception):
    """This block has to be replayed operation by operation."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that outlives its instruction: where its bytes are, and what it is by then."""

    ident: int  # among the block's storages
    nbytes: int
    size: int  # of the block: nbytes, aligned
    category: MemoryCategory
    label: str
    numel: int
    itemsize: int
    has_base: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Value:
        s = tensor.storage
        return cls(
            s.id,
            s.nbytes,
            s.size if s.nbytes else 0,
            s.category,
            s.label,
            tensor.numel,
            tensor.itemsize,
            tensor.has_base,
        )

    def adopt(self, trace: Trace, first: int, label: str) -> Tensor:
        """The tensor whose bytes the recording has allocated, of a block whose storages are numbered from ``first``."""
        storage = Storage.adopted(trace, first + self.ident, self.nbytes, self.size, self.category, label)
        tensor = Tensor(storage, self.numel, self.itemsize)
        tensor.has_base = self.has_base
        return tensor


@dataclass(slots=True)
class Play:
    """Events in the block's own storages."""

    segment: Segment


@dataclass(frozen=True, slots=True)
class Hook:
    """The strategy's hook on a module's input (``entering``) or output; ``needs_gradient``: there is a node there."""

    module: str  # without the block's name
    entering: bool
    needs_gradient: bool


@dataclass(frozen=True, slots=True)
class Pass:
    """The backward of the node that a hook put."""

    module: str
    entering: bool


@dataclass(frozen=True, slots=True)
class Gradient:
    """A parameter's gradient is there."""

    parameter: str
    value: Value


@dataclass(frozen=True, slots=True)
class Hold:
    """The parameter's present storage is kept (``let_go`` false), or no longer."""

    index: int
    parameter: str
    let_go: bool


@dataclass(frozen=True, slots=True)
class Outer:
    """The block's input, or the gradient that came in: given back, or counted as another category from here on."""

    gradient: bool
    category: MemoryCategory | None


@dataclass(frozen=True, slots=True)
class Workspace:
    """A library's workspace is needed, and made if it is not there."""

    key: str
    nbytes: int


Instruction = Play | Hook | Pass | Gradient | Hold | Outer | Workspace


@dataclass(slots=True)
class Rounds:
    """A pass with what its hooks do to memory among its events, and those hooks (``lab.analytic.layer_rounds``)."""

    steps: list[Instruction]
    hooks: list[Hook | Pass]


@dataclass
class Recording:
    """What one block does."""

    module: str  # the block that was recorded
    num_storages: int
    forward: list[Instruction]
    output: Value
    casts: list[tuple[str, Value]]  # autocast copies that only the model's cache holds
    keeps_input: bool
    differentiable: bool = False
    backward: list[Instruction] = field(default_factory=list)
    returned: Value | None = None  # what arrives at the block's input
    returns_gradient: bool = False  # it is the gradient that came in
    gradient: Incoming | None = None  # what was taken for the gradient that comes in
    attributes: list[Value | None] = field(default_factory=list)  # kept to the graph's end; None: the block's input
    gradients: list[tuple[str, Value]] = field(default_factory=list)  # of parameters, as they are when they are there
    workspaces: set[str] = field(default_factory=set)  # that are made if they are not there
    rounds: dict[str, Rounds | None] = field(default_factory=dict)  # see lab.analytic.layer_rounds
    merged: dict[str, list[Instruction]] = field(default_factory=dict)  # see lab.analytic.layer_merging
    backward_placed: bool = False  # are its segments in the trace?
    arrivals: dict[str, Play] = field(default_factory=dict)  # of PASSED_ON gradients, by parameter
    kept: Kept | None = None  # of KEPT gradients, what they are like together
    settled: Recording | None = None  # the same where all workspaces are there


def settled(recording: Recording) -> Recording:
    """``Recording.settled``."""
    forward, backward = (_without_workspaces(s, recording.module) for s in (recording.forward, recording.backward))
    fresh: dict[str, Any] = {"rounds": {}, "merged": {}, "arrivals": {}, "backward_placed": False}
    return replace(recording, forward=forward, backward=backward, workspaces=set(), **fresh)


def _without_workspaces(instructions: Sequence[Instruction], module: str) -> list[Instruction]:
    """What the block does before and after one would be made is a single run of events then."""
    out: list[Instruction] = []
    for step in instructions:
        if isinstance(step, Play) and out and isinstance(out[-1], Play):
            out[-1] = Play(Segment([*out[-1].segment.events, *step.segment.events], module))
        elif not isinstance(step, Workspace):
            out.append(step)
    return out


class Incoming(NamedTuple):
    """A tensor from outside, as far as it matters inside."""

    nbytes: int
    category: MemoryCategory
    numel: int
    itemsize: int
    has_base: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Incoming:
        s = tensor.storage
        return cls(s.nbytes, s.category, tensor.numel, tensor.itemsize, tensor.has_base)

    def make(self, trace: Trace, label: str) -> Tensor:
        tensor = Tensor(Storage(trace, self.nbytes, self.category, label), self.numel, self.itemsize)
        tensor.has_base = self.has_base
        return tensor
