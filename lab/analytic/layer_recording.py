"""One block run by itself, forward and backward, on a tape of its own: what any block of the same kind does.

The recording runs the decoder's own code over stand-ins for the block's parameters, the strategy's hooks and the
gradient that comes in. What the code does to memory is either the block's own affair, in an order that is the same in
every layer (``Play`` of a ``Segment``), or it touches something outside the block: a hook of the strategy, the gradient
of a parameter, the block's input, an autocast copy that the model's cache holds, a library's workspace. Each of those
becomes an instruction that ``lab.analytic.layers`` carries out for real, at the same place in the order.

Nothing is recorded (``Unrecordable``) of a block that changes a parameter for good, saves a tensor of the model's, or
lets go of something in a way that has no instruction here. Such blocks are replayed operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace
from functools import partial

from lab.analytic.decoder import Decoder
from lab.analytic.layer_instructions import (
    Gradient,
    Hold,
    Incoming,
    Instruction,
    Outer,
    Play,
    Recording,
    Unrecordable,
    Value,
)
from lab.analytic.layer_merging import gradients_of
from lab.analytic.layer_scratch import NOTE, ScratchRun, ScratchTrace, scratch_world
from lab.analytic.ops import Parameter
from lab.analytic.segments import Segment
from lab.analytic.sharding.base import Rule
from lab.analytic.tape import FREE, MOVE, Event, Grads, Node, count_dependencies
from lab.vocab import MemoryCategory

INPUT = 0  # the first storage is the block's input


def record(
    decoder: Decoder,
    rule: Rule,
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
    run = scratch_world(decoder, rule, f"blocks.{i}", members)
    try:
        return _record(run, i, x, needs_gradient, gradient)
    except KeyError as error:
        raise Unrecordable(f"parameter {error} is not of the block") from error
    finally:
        if (len(live.events), live.next_id) != before:
            raise AssertionError("a recording touched the run")


def _record(run: ScratchRun, i: int, incoming: Incoming, needs_gradient: bool, gradient: Incoming | None) -> Recording:
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
    begin = len(events)
    y = [run.decoder.call_block(i, x[0])]
    forward = events[begin:]
    if any(run.params[name].tensor is not t for name, t in tensors.items()):
        raise Unrecordable("a parameter changed for good")
    output, node, slot = Value.of(y[0]), y[0].node, y[0].slot
    casts = _last_references(run)
    keeps_input = not _freed_by(events, x.clear)
    if not _freed_by(events, y.clear):
        raise Unrecordable("the block keeps its output")
    num_forward = trace.next_id
    if node is None:
        return Recording(
            f"blocks.{i}",
            num_forward,
            _instructions(trace, forward, INPUT, -1, i),
            output,
            casts,
            keeps_input,
            workspaces=run.workspaces.noted,
        )
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
    recorded = _instructions(trace, backward, INPUT, came, i, held)
    return Recording(
        f"blocks.{i}",
        trace.next_id,
        _instructions(trace, forward, INPUT, came, i),
        output,
        casts,
        keeps_input,
        True,
        recorded,
        returned,
        returned is not None and returned.ident == came,
        gradient,
        attributes,
        gradients_of(recorded),
        run.workspaces.noted,
    )


def _freed_by(events: list[Event], drop: Callable[[], None]) -> bool:
    before = len(events)
    drop()
    return any(e[0] == FREE for e in events[before:])


def _last_references(run: ScratchRun) -> list[tuple[str, Value]]:
    """Autocast copies that nothing but the cache holds, in its order."""
    cache, found = run.ops.cast_cache, []
    for name in list(cache):
        copied = Value.of(cache[name])
        if _freed_by(run.trace.events, partial(cache.__delitem__, name)):
            found.append((name, copied))
    return found


def _instructions(
    trace: ScratchTrace, events: list[Event], block_input: int, gradient: int, i: int, held: Set[int] = frozenset()
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
        elif kind == NOTE:
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
