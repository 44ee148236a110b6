"""One block run by itself, forward and backward, on a tape of its own: what any block of the same kind does.

The recording runs the decoder's own code over stand-ins for the block's parameters, the strategy's hooks and the
gradient that comes in. What the code does to memory is either the block's own affair, in an order that is the same in
every layer (``Play`` of a ``Segment``), or it touches something outside the block: a hook of the strategy, the gradient
of a parameter, the block's input, an autocast copy that the model's cache holds. Each of those becomes an instruction
that ``lab.analytic.layers`` carries out for real, at the same place in the order.

Nothing is recorded (``Unrecordable``) of a block that changes a parameter for good, saves a tensor of the model's, or
lets go of something in a way that has no instruction here. Such blocks are replayed operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial

from lab.analytic.decoder import Decoder
from lab.analytic.linears import Linears
from lab.analytic.ops import Ops, Parameter
from lab.analytic.segments import Segment
from lab.analytic.sharding.base import Rule
from lab.analytic.tape import (
    FREE,
    MOVE,
    Accumulator,
    Event,
    Grads,
    Node,
    Storage,
    Tape,
    Tensor,
    Trace,
    count_dependencies,
)
from lab.vocab import MemoryCategory

_NOTE = 100  # kind of an event that stands for an instruction; its second field is the index in ``notes``


class Unrecordable(Exception):
    """This block has to be replayed operation by operation."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that outlives its instruction: where its bytes are, and what it is by then."""

    ident: int  # among the block's storages
    nbytes: int
    category: MemoryCategory
    label: str
    numel: int
    itemsize: int
    has_base: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Value:
        s = tensor.storage
        return cls(s.id, s.nbytes, s.category, s.label, tensor.numel, tensor.itemsize, tensor.has_base)


@dataclass(slots=True)
class Play:
    """Events in the block's own storages. ``place``: the segment's index in the trace that it is played into."""

    segment: Segment
    place: int = -1


@dataclass(frozen=True, slots=True)
class Hook:
    """The strategy's hook on a module's input (``entering``) or output; ``node``: it puts a node there."""

    module: str
    entering: bool
    needs_gradient: bool
    node: bool


@dataclass(frozen=True, slots=True)
class Pass:
    """The backward of the n-th node that a hook put."""

    node: int


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


Instruction = Play | Hook | Pass | Gradient | Hold | Outer


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
    needed_workspaces: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Incoming:
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


class _Scratch(Trace):
    """A trace with instructions between its events."""

    __slots__ = ("notes",)

    def __init__(self, of: Trace) -> None:
        super().__init__(of.alignment, of.on_device_kernels)
        self.notes: list[Instruction | Value] = []

    def note(self, what: Instruction | Value) -> None:
        self.events.append((_NOTE, len(self.notes), 0, "", "", 0))
        self.notes.append(what)


class _Ghost(Storage):
    """Stands for a parameter's storage that is saved; says when it is let go of."""

    __slots__ = ("hold",)

    def __init__(self, trace: _Scratch, category: MemoryCategory, parameter: str) -> None:
        super().__init__(trace, 0, category, "")
        self.hold = Hold(len(trace.notes), parameter, False)
        trace.note(self.hold)

    def __del__(self) -> None:
        if isinstance(self.trace, _Scratch):
            self.trace.note(Hold(self.hold.index, self.hold.parameter, True))


class _ScratchTape(Tape):
    def __init__(self, trace: _Scratch, swapped: bool) -> None:
        super().__init__(trace)
        self.scratch, self.swapped = trace, swapped
        self.names: dict[int, str] = {}  # parameters' storages

    def save(self, node: Node | None, tensor: Tensor) -> None:
        storage = tensor.storage
        if node is not None and storage.trace is not self.trace:
            raise Unrecordable("a tensor of the model's is saved")
        name = self.names.get(id(storage))
        if node is not None and name is not None and self.swapped:
            tensor = Tensor(_Ghost(self.scratch, storage.category, name), tensor.numel, tensor.itemsize)
        super().save(node, tensor)


class _ScratchHooks:
    """What ``Rule.enter`` and ``leave`` do to a graph, by the rule's own account (``hook_nodes``)."""

    def __init__(self, trace: _Scratch, tape: Tape, own: str, called: bool, nodes: bool) -> None:
        self.trace, self.tape, self.own, self.called, self.nodes = trace, tape, own, called, nodes
        self.count = 0

    def enter(self, module: str, x: Tensor) -> Tensor:
        return self._hook(module, x, True, x.node is not None)

    def leave(self, module: str, y: Tensor) -> Tensor:
        return self._hook(module, y, False, True)

    def _hook(self, module: str, x: Tensor, entering: bool, node: bool) -> Tensor:
        if not self.called:
            return x
        if not module.startswith(self.own + "."):
            raise Unrecordable(f"{module} is not of the block")
        node = node and self.nodes
        self.trace.note(Hook(module[len(self.own) :], entering, x.node is not None, node))
        if not node:
            return x
        place = Pass(self.count)
        self.count += 1

        def backward(grads: Grads) -> Grads:
            self.trace.note(place)
            return [grads[0]]

        return x.view(node=Node(self.tape, [x], backward))

    def pre_forward(self, unit: int) -> None: ...
    def enter_source(self, module: str) -> None: ...

    def post_forward(self, unit: int, out: Tensor) -> Tensor:
        return out

    def wrap_input(self, unit: int, x: Tensor) -> Tensor:
        return x


class _ScratchAccumulator(Accumulator):
    """Notes the gradient and gives it up at once: who holds it from here on is the strategy's affair."""

    __slots__ = ("suffix", "trace")

    def __init__(self, name: str, suffix: str, trace: _Scratch) -> None:
        super().__init__(name)
        self.suffix, self.trace = suffix, trace

    def _accumulate(self, grads: Grads) -> Grads:
        assert grads[0] is not None
        self.trace.note(Gradient(self.suffix, Value.of(grads[0])))
        grads[0] = None
        return []


class _Workspaces(dict[str, Tensor]):
    """The live run's; what the forward would add is seen afterwards, the backward's are there by then."""

    def __init__(self, live: dict[str, Tensor]) -> None:
        super().__init__(live)
        self.assume = False
        self.assumed: set[str] = set()

    def __contains__(self, key: object) -> bool:
        if self.assume and isinstance(key, str):
            self.assumed.add(key)
            return True
        return super().__contains__(key)


@dataclass
class _Run:
    """One block in a scratch world."""

    decoder: Decoder
    ops: Ops
    tape: _ScratchTape
    trace: _Scratch
    params: dict[str, Parameter]
    workspaces: _Workspaces


def record(
    decoder: Decoder,
    i: int,
    members: dict[str, Parameter],
    x: Incoming,
    needs_gradient: bool,
    gradient: Incoming | None = None,
) -> Recording:
    """Block ``i`` applied to ``x``. Raises Unrecordable.

    ``members``: its parameters, by name without the block's. ``gradient``: what comes in at backward; None: a fresh
    tensor like the output.
    """
    live = decoder.ops.tape.trace
    before = len(live.events), live.next_id
    run = _scratch_world(decoder, f"blocks.{i}", members)
    try:
        return _record(run, i, x, needs_gradient, gradient)
    except KeyError as error:
        raise Unrecordable(f"parameter {error} is not of the block") from error
    finally:
        if (len(live.events), live.next_id) != before:
            raise AssertionError("a recording touched the run")


def has_module_hooks(rule: object) -> bool:
    """Does the strategy do anything around modules inside blocks?"""
    return getattr(type(rule), "enter", None) is not Rule.enter or getattr(type(rule), "leave", None) is not Rule.leave


def _scratch_world(decoder: Decoder, own: str, members: dict[str, Parameter]) -> _Run:
    live_ops, rule = decoder.ops, decoder.hooks
    trace = _Scratch(live_ops.tape.trace)
    tape = _ScratchTape(trace, live_ops.linear_keeps_parameter)
    params: dict[str, Parameter] = {}
    for suffix, parameter in members.items():
        stub = copy(parameter)
        storage = Storage(trace, 0, parameter.tensor.storage.category, "")
        stub.tensor = Tensor(storage, parameter.tensor.numel, parameter.tensor.itemsize)
        stub.accumulator = _ScratchAccumulator(parameter.name, suffix, trace)
        tape.names[id(storage)] = suffix
        params[parameter.name] = stub
    ops = copy(live_ops)
    workspaces = _Workspaces(live_ops.workspaces)
    ops.tape, ops.cast_cache, ops.workspaces = tape, {}, workspaces
    hooks = _ScratchHooks(trace, tape, own, called=has_module_hooks(rule), nodes=getattr(rule, "hook_nodes", False))
    alone = copy(decoder)
    alone.ops, alone.p, alone.hooks = ops, params, hooks
    alone.linears = Linears(decoder.cfg, ops, params, hooks)
    return _Run(alone, ops, tape, trace, params, workspaces)


INPUT = 0  # the first storage is the block's input


def _record(run: _Run, i: int, incoming: Incoming, needs_gradient: bool, gradient: Incoming | None) -> Recording:
    trace, tape = run.trace, run.tape
    events = trace.events

    def arrive(grads: Grads) -> Grads:  # at the block's input
        assert grads[0] is not None
        trace.note(Value.of(grads[0]))
        grads[0] = None
        return []

    x = [incoming.make(trace, "block input")]
    if needs_gradient:
        x[0].node = Node(tape, [], arrive)
    tensors = {name: p.tensor for name, p in run.params.items()}
    known = set(run.workspaces)
    begin = len(events)
    y = [run.decoder.call_block(i, x[0])]
    forward = events[begin:]
    if set(run.workspaces) != known or any(run.params[name].tensor is not t for name, t in tensors.items()):
        raise Unrecordable("a workspace is taken, or a parameter changed, for good")
    output, node, slot = Value.of(y[0]), y[0].node, y[0].slot
    casts = _last_references(run)
    keeps_input = not _freed_by(events, x.clear)
    if not _freed_by(events, y.clear):
        raise Unrecordable("the block keeps its output")
    num_forward = trace.next_id
    if node is None:
        return Recording(
            f"blocks.{i}", num_forward, _instructions(trace, forward, INPUT, -1, i), output, casts, keeps_input
        )
    run.workspaces.assume = True
    count_dependencies(node)
    grads: Grads = [None] * node.num_slots
    if gradient is None:
        gradient = Incoming(output.nbytes, MemoryCategory.TEMPORARIES, output.numel, output.itemsize)
    grads[slot] = gradient.make(trace, "gradient of the block's output")
    came = trace.next_id - 1
    node.buffer = grads
    begin, start = len(events), [node]
    del grads, node
    tape.run(start)
    backward = events[begin:]
    attributes = [None if t.storage.id == INPUT else Value.of(t) for t in tape.held_by_graph]
    if any(a is not None and a.ident == came for a in attributes):
        raise Unrecordable("the incoming gradient is kept to the graph's end")
    tape.held_by_graph.clear()
    returned = None
    if needs_gradient:
        returned = next((n for n in reversed(trace.notes) if isinstance(n, Value)), None)
        if returned is None:
            raise Unrecordable("no gradient reaches the block's input")
    held = {a.ident for a in attributes if a is not None}
    return Recording(
        f"blocks.{i}",
        trace.next_id,
        _instructions(trace, forward, INPUT, came, i),
        output,
        casts,
        keeps_input,
        True,
        _instructions(trace, backward, INPUT, came, i, held),
        returned,
        returned is not None and returned.ident == came,
        gradient,
        attributes,
        run.workspaces.assumed - known,
    )


def _freed_by(events: list[Event], drop: Callable[[], None]) -> bool:
    before = len(events)
    drop()
    return any(e[0] == FREE for e in events[before:])


def _last_references(run: _Run) -> list[tuple[str, Value]]:
    """Autocast copies that nothing but the cache holds, in its order."""
    cache, found = run.ops.cast_cache, []
    for name in list(cache):
        copied = Value.of(cache[name])
        if _freed_by(run.trace.events, partial(cache.__delitem__, name)):
            found.append((name, copied))
    return found


def _instructions(
    trace: _Scratch, events: list[Event], block_input: int, gradient: int, i: int, held: Set[int] = frozenset()
) -> list[Instruction]:
    """Events with notes among them -> instructions; runs of events in the block's own storages become segments."""
    out: list[Instruction] = []
    pending: list[Event] = []
    given_up = -1  # the storage whose owner is outside from here on

    def flush() -> None:
        if pending:
            out.append(Play(Segment(pending, f"blocks.{i}")))
            pending.clear()

    for event in events:
        kind, ident = event[0], event[1]
        if given_up >= 0:  # a note on a value is followed by its release
            if (kind, ident) != (FREE, given_up):
                raise Unrecordable("a gradient is kept beside the one who gets it")
            given_up = -1
        elif kind == _NOTE:
            note = trace.notes[ident]
            if isinstance(note, Value):
                given_up = note.ident
                continue
            if (
                isinstance(note, Hold)
                and note.let_go
                and not pending
                and out
                and out[-1] == replace(note, let_go=False)
            ):
                out.pop()  # let go of at once
                continue
            flush()
            out.append(note)
            if isinstance(note, Gradient):
                given_up = note.value.ident
                if given_up in (block_input, gradient):
                    raise Unrecordable("a tensor from outside becomes a gradient")
        elif ident in (block_input, gradient):
            flush()
            category = MemoryCategory(event[3]) if kind == MOVE else None
            out.append(Outer(ident == gradient, category))
        elif ident in held:
            raise Unrecordable("a tensor that is kept to the graph's end")
        else:
            pending.append(event)
    flush()
    return out
