"""Blocks of one kind replayed from one recording: the same events, without running the block's code for each.

``repeat_layers(replay)`` puts itself in the place of the decoder's ``call_block``. A block is recorded the first time
that one of its kind is met (``lab.analytic.layer_recording``); from then on its events are those of the recording, with
storages and names of its own, and everything that concerns others happens for real: the strategy's hooks, parameters'
gradients, the block's input and output. To the engine it is one node.

Two blocks are of one kind if they have the same parameters (names, shapes, element sizes, frozen or not, quantized or
not), the same input, and are checkpointed alike; the gradient that comes in is compared as well, when it does. A block
that cannot be recorded is replayed operation by operation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from sys import getrefcount

from lab.analytic.decoder import Decoder
from lab.analytic.layer_instructions import (
    Gradient,
    Hold,
    Hook,
    Incoming,
    Instruction,
    Outer,
    Pass,
    Play,
    Recording,
    Unrecordable,
    Value,
)
from lab.analytic.layer_recording import record
from lab.analytic.ops import Parameter
from lab.analytic.step import Replay
from lab.analytic.tape import SEGMENT, Backward, Grads, Node, Storage, Tensor
from lab.config import RunConfig
from lab.vocab import MemoryCategory

SPARE = 64  # storages by which a recording with another incoming gradient may exceed the first


def replay_steps(
    cfg: RunConfig, rank: int, for_allocator: bool = True, further: int = 0, fresh: Replay | None = None
) -> Replay:
    """A run built and stepped up to the step from which steps repeat, or its last; ``trace`` may hold segments.

    ``for_allocator``: up to where its cached segments repeat as well. ``further``: that many steps more. ``fresh``: a
    replay that is not built yet, to be used.
    """
    for repeat in (True, False):
        replay = fresh or Replay(cfg, rank)
        replay.rule.rank, fresh = rank, None
        replay.build()
        if repeat:
            repeat_layers(replay)
        last = replay.rule.steady_step if for_allocator else replay.rule.repeats_from
        try:
            for _ in range(min(cfg.train.steps, last + 1 + further)):
                replay.step()
        except Unrecordable:
            continue
        return replay
    raise AssertionError("a replay without recordings needs none")


def repeat_layers(replay: Replay) -> None:
    """After ``replay.build()``: blocks of one kind are run once. Families with a loop of their own are left alone."""
    if type(replay.decoder) is Decoder:
        replay.decoder.call = Layers(replay).call


def dismantle(replay: Replay) -> None:
    """Take apart what refers to itself in a replay that is over, so that it goes without the garbage collector."""
    replay.decoder.call = None
    for parameter in replay.rule.parameters.values():
        parameter.accumulator.on_grad = parameter.accumulator.backward = None


class _Layer:
    """One call of one block: what it keeps from forward to backward."""

    __slots__ = ("first", "gradient", "held", "index", "input", "module", "nodes", "recording", "source")

    def __init__(self, recording: Recording, index: int, first: int, x: Tensor) -> None:
        self.recording, self.index, self.first = recording, index, first
        self.module = f"blocks.{index}"
        self.source = Incoming.of(x), x.node is not None
        self.input: Tensor | None = None
        self.gradient: Tensor | None = None
        self.nodes: list[Backward] = []
        self.held: dict[int, Tensor] = {}

    def renamed(self, name: str) -> str:
        """A name in the recorded block, as this block has it."""
        return name.replace(self.recording.module + ".", self.module + ".")


class Layers:
    """The decoder's blocks, by kind."""

    def __init__(self, replay: Replay) -> None:
        self.decoder, self.ops, self.tape, self.trace = replay.decoder, replay.ops, replay.tape, replay.trace
        self.rule = replay.rule
        self.members: list[dict[str, Parameter]] = [{} for _ in range(replay.cfg.model.num_layers)]
        for name, parameter in replay.rule.parameters.items():
            if name.startswith("blocks."):
                index, suffix = name[7:].split(".", 1)
                self.members[int(index)][suffix] = parameter
        self.shapes = [
            tuple((s, p.shape, p.trainable, p.quantized and p.quantized.kind) for s, p in m.items())
            for m in self.members
        ]
        self.recordings: dict[Hashable, Recording | None] = {}
        # Workspaces are taken for good: in forward by the first block; in backward by the head, but for those that a
        # recomputation takes first, which is the last checkpointed block's.
        self.first_pass = True
        checkpointed = [i for i in range(len(self.members)) if self.decoder.checkpointed(i)]
        self.takes_workspaces = {0, *checkpointed[-1:]}
        nothing = Storage(self.trace, 0, MemoryCategory.TEMPORARIES, "")
        self.plain = Tensor(nothing, 1, 1)  # what hooks are called with: they look at the node alone
        self.differentiable = Tensor(nothing, 1, 1, Node(self.tape, [], lambda grads: []))

    def call(self, i: int, x: Tensor) -> Tensor:
        """Block i's output."""
        last = len(self.members) - 1
        alone = self.tape.pack is not None or (self.first_pass and i in self.takes_workspaces)
        recording = None if alone else self._recording(i, x)
        if i == last:
            self.first_pass = False
        if recording is None:
            return self.decoder.call_block(i, x)
        trace, layer = self.trace, _Layer(recording, i, self.trace.next_id, x)
        trace.next_id += recording.num_storages + SPARE
        if recording.keeps_input:
            layer.input = x.view()
        self._run(layer, recording.forward, x)
        for name, value in recording.casts:
            self.ops.cast_cache[layer.renamed(name)] = self._adopt(value, layer)
        y = self._adopt(recording.output, layer)
        if recording.differentiable:
            y.node = Node(self.tape, [x], lambda grads: self._backward(layer, grads))
        return y

    def _recording(self, i: int, x: Tensor) -> Recording | None:
        members = self.members[i]
        sizes = tuple(p.tensor.itemsize for p in members.values())
        key = (self.shapes[i], sizes, self.decoder.checkpointed(i), Incoming.of(x), x.node is None, self.ops.amp)
        if key not in self.recordings:
            try:
                found = record(self.decoder, i, members, Incoming.of(x), x.node is not None)
                self.recordings[key] = self._placed(found)
            except Unrecordable:
                self.recordings[key] = None
        return self.recordings[key]

    def _placed(self, recording: Recording) -> Recording:
        """With its segments in the trace."""
        for step in (*recording.forward, *recording.backward):
            if isinstance(step, Play):
                step.place = len(self.trace.segments)
                self.trace.segments.append(step.segment)
        return recording

    def _backward(self, layer: _Layer, grads: Grads) -> Grads:
        """The block's backward: ``grads`` is the gradient of its output, what is returned that of its input."""
        gradient = grads.pop()
        assert gradient is not None
        # Held by `gradient` and getrefcount's argument; the storage by the tensor and the argument.
        if getrefcount(gradient) != 2 or getrefcount(gradient.storage) != 2:
            raise Unrecordable("the incoming gradient is held by others too")
        recording = layer.recording
        if Incoming.of(gradient) != recording.gradient:
            recording = layer.recording = self._with_gradient(layer, Incoming.of(gradient))
        if not recording.needed_workspaces <= self.ops.workspaces.keys():
            raise Unrecordable("a workspace is taken in backward")
        layer.gradient = gradient
        del gradient
        self._run(layer, recording.backward, None)
        returned: Tensor | None = None
        if recording.returned is not None and recording.returns_gradient:
            returned, layer.gradient = layer.gradient, None
            assert returned is not None
            returned.has_base = recording.returned.has_base
        elif recording.returned is not None:
            returned = self._adopt(recording.returned, layer)
        if recording.attributes:
            self._keep_attributes(layer)
        return [returned]

    def _with_gradient(self, layer: _Layer, gradient: Incoming) -> Recording:
        """The block recorded again, with the gradient that came."""
        first = layer.recording
        key = (id(first), gradient)
        if key not in self.recordings:
            index = int(first.module.rpartition(".")[2])
            self.recordings[key] = self._placed(
                record(self.decoder, index, self.members[index], *layer.source, gradient)
            )
        found = self.recordings[key]
        if found is None or found.num_storages > first.num_storages + SPARE:
            raise Unrecordable("another gradient makes another backward")
        return found

    def _run(self, layer: _Layer, instructions: Sequence[Instruction], x: Tensor | None) -> None:
        play, first, module = self.trace.events.append, layer.first, layer.module
        members = self.members[layer.index]
        for step in instructions:
            if type(step) is Play:
                play((SEGMENT, first, step.place, module, "", 0))
            elif type(step) is Gradient:
                accumulator = members[step.parameter].accumulator
                run = accumulator.backward
                assert run is not None
                run([self._adopt(step.value, layer)])
            elif isinstance(step, Hook):
                self._hook(layer, step)
            elif isinstance(step, Pass):
                layer.nodes[step.node]([self.plain])
            elif isinstance(step, Outer):
                self._outer(layer, step, x)
            elif isinstance(step, Hold):
                if step.let_go:
                    del layer.held[step.index]
                else:
                    layer.held[step.index] = members[step.parameter].tensor

    def _hook(self, layer: _Layer, step: Hook) -> None:
        hook = self.rule.enter if step.entering else self.rule.leave
        given = self.differentiable if step.needs_gradient else self.plain
        made = hook(layer.module + step.module, given)
        if (made is not given) != step.node:
            raise Unrecordable("a hook does not do what the strategy says of it")
        if step.node:
            assert made.node is not None
            assert made.node.backward is not None
            layer.nodes.append(made.node.backward)

    def _outer(self, layer: _Layer, step: Outer, x: Tensor | None) -> None:
        """Moved to another category, or let go of."""
        if step.category is not None:
            tensor = layer.gradient if step.gradient else x or layer.input
            assert tensor is not None
            tensor.storage.move(step.category)
        elif step.gradient:
            layer.gradient = None
        else:
            layer.input = None

    def _keep_attributes(self, layer: _Layer) -> None:
        """What custom functions keep beside their saved tensors goes with the graph."""
        kept: dict[int, Tensor] = {}
        for value in layer.recording.attributes:
            if value is None:
                assert layer.input is not None
                self.tape.held_by_graph.append(layer.input.view())
            elif value.ident in kept:
                self.tape.held_by_graph.append(kept[value.ident].view())
            else:
                kept[value.ident] = self._adopt(value, layer)
                self.tape.held_by_graph.append(kept[value.ident])
        layer.input = None

    def _adopt(self, value: Value, layer: _Layer) -> Tensor:
        """The tensor whose bytes the recording has allocated."""
        ident, label = layer.first + value.ident, layer.renamed(value.label)
        tensor = Tensor(
            Storage.adopted(self.trace, ident, value.nbytes, value.category, label), value.numel, value.itemsize
        )
        tensor.has_base = value.has_base
        return tensor
