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
from lab.analytic.gradients import Kept, KeptTogether
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
    Workspace,
    settled,
)
from lab.analytic.layer_merging import FIRST, LATER, merged_backward, quiet_arrivals
from lab.analytic.layer_recording import record
from lab.analytic.layer_rounds import RoundRecorder
from lab.analytic.ops import Parameter
from lab.analytic.segments import Segment
from lab.analytic.sharding.base import KEPT
from lab.analytic.step import Replay
from lab.analytic.tape import SEGMENT, Grads, Node, Tensor
from lab.config import RunConfig

FORWARD, BACKWARD = "forward", "backward"
SPARE = 64  # storages by which a recording with another incoming gradient may exceed the first


class Known:
    """Recordings of one run's blocks, for all its ranks: what a block does inside is the same on each."""

    def __init__(self) -> None:
        self.recordings: dict[Hashable, Recording | None] = {}
        self.kinds: dict[Hashable, int] = {}  # blocks with like parameters
        self.segments: list[Segment] = []


def replay_steps(
    cfg: RunConfig,
    ranks: int | Sequence[int],
    for_allocator: bool = True,
    fresh: Replay | None = None,
    known: Known | None = None,
) -> Replay:
    """A run built and stepped up to the step from which steps repeat, or its last; ``trace`` may hold segments.

    ``ranks``: one, or several that one replay serves (``Rule.replays``).
    ``for_allocator``: up to where its cached segments mostly repeat as well (``simulation.settle`` goes on from there).
    ``fresh``: a replay that is not built yet, to be used. ``known``: what other ranks' replays have recorded, and this
    one adds.
    """
    known = known or Known()
    rank, *further_ranks = [ranks] if isinstance(ranks, int) else ranks
    for repeat in (True, False):
        replay = fresh or Replay(cfg, rank)
        replay.rule.rank, replay.rule.further_ranks, fresh = rank, further_ranks, None
        replay.trace.shorthand, replay.trace.segments = True, known.segments
        replay.build()
        if repeat:
            repeat_layers(replay, known)
        last = replay.rule.steady_step if for_allocator else replay.rule.repeats_from
        try:
            for _ in range(min(cfg.train.steps, last + 1)):
                replay.step()
        except Unrecordable:
            continue
        return replay
    raise AssertionError("a replay without recordings needs none")


def repeat_layers(replay: Replay, known: Known | None = None) -> None:
    """After ``replay.build()``: blocks of one kind are run once. Families with a loop of their own are left alone."""
    if type(replay.decoder) is Decoder:
        replay.decoder.call = Layers(replay, known or Known()).call


def dismantle(replay: Replay) -> None:
    """Take apart what refers to itself in a replay that is over, so that it goes without the garbage collector."""
    replay.decoder.call = None
    if replay.rule.told:
        for parameter in replay.rule.parameters.values():
            parameter.accumulator.on_grad = None


class _Layer:
    """One call of one block: what it keeps from forward to backward."""

    __slots__ = ("first", "gradient", "held", "index", "input", "module", "names", "passed_on", "recording", "source")

    def __init__(self, recording: Recording, index: int, first: int, x: Tensor, names: dict[str, str]) -> None:
        self.recording, self.index, self.first = recording, index, first
        self.module, self.names = f"blocks.{index}", names
        self.source = Incoming.of(x), x.node is not None
        self.input: Tensor | None = None
        self.gradient: Tensor | None = None
        self.held: dict[int, Tensor] = {}
        self.passed_on: dict[str, Play] = {}  # parameters' gradients that come and go

    def renamed(self, name: str) -> str:
        """A name in the recorded block, as this block has it."""
        return name.replace(self.recording.module + ".", self.module + ".")


class _Trained:
    """A block's parameters with gradients, as those arrive; their accumulators and gradients in the model's order."""

    __slots__ = ("accumulators", "gradients", "in_order", "parameters")

    def __init__(self, gradients: list[tuple[str, Value]], members: dict[str, Parameter]) -> None:
        self.gradients, of = gradients, dict(gradients)
        self.parameters = [members[name] for name, _ in gradients]
        self.accumulators = [p.accumulator for name, p in members.items() if name in of]
        self.in_order = [of[name] for name in members if name in of]


class Layers:
    """The decoder's blocks, by kind."""

    def __init__(self, replay: Replay, known: Known) -> None:
        self.decoder, self.ops, self.tape, self.trace = replay.decoder, replay.ops, replay.tape, replay.trace
        self.rule = replay.rule
        self.members: list[dict[str, Parameter]] = []
        self.kinds: list[int] = []
        for block, specs, kind in self.rule.unit_specs:
            if block:
                i, start, members = specs[0].unit, len(block) + 1, [self.rule.parameters[s.name] for s in specs]
                assert i == len(self.members), "parameters of the blocks come block by block"
                self.members.append({p.name[start:]: p for p in members})
                key = kind, tuple([p.tensor.itemsize for p in members]), self.decoder.checkpointed(i)
                self.kinds.append(known.kinds.setdefault(key, len(known.kinds)))
        self.names: list[dict[str, str]] = [
            {} for _ in self.members
        ]  # labels of one recording's, as the block has them
        self.recordings = known.recordings
        self.trained: list[_Trained | None] = [None for _ in self.members]
        self.num_hook_storages = 2 * max(map(len, self.members)) if self.rule.module_hooks else 0  # of one pass

    def call(self, i: int, x: Tensor) -> Tensor:
        """Block i's output."""
        recording = None if self.tape.pack is not None else self._recording(i, x)
        if recording is None:
            return self.decoder.call_block(i, x)
        trace, layer = self.trace, _Layer(recording, i, self.trace.next_id, x, self.names[i])
        trace.next_id += recording.num_storages + SPARE + 2 * self.num_hook_storages
        if recording.keeps_input:
            layer.input = x.view()
        self._run_with_hooks(layer, recording.forward, x, FORWARD)
        for name, value in recording.casts:
            self.ops.cast_cache[layer.renamed(name)] = self._adopt(value, layer)
        y = self._adopt(recording.output, layer)
        if recording.differentiable:
            y.node = Node(self.tape, [x], lambda grads: self._backward(layer, grads))
        return y

    def _recording(self, i: int, x: Tensor) -> Recording | None:
        incoming = Incoming.of(x)
        key = self.kinds[i], incoming, x.node is None, self.ops.amp
        if key not in self.recordings:
            try:
                found = record(self.decoder, self.rule, i, self.members[i], incoming, x.node is not None)
                self._place(found.forward)
                self.recordings[key] = found
            except Unrecordable:
                self.recordings[key] = None
        known = self.recordings[key]
        return known and self._settled(known)

    def _settled(self, recording: Recording) -> Recording:
        """Without the workspaces that it makes, once all are there."""
        if not recording.workspaces or not recording.workspaces <= self.ops.workspaces.taken.keys():
            return recording
        if recording.settled is None:
            recording.settled = settled(recording)
            self._place(recording.settled.forward)
        return recording.settled

    def _place(self, instructions: Sequence[Instruction]) -> None:
        """Their segments into the trace."""
        for step in instructions:
            if isinstance(step, Play):
                step.segment.put(self.trace)

    def _backward(self, layer: _Layer, grads: Grads) -> Grads:
        """The block's backward: ``grads`` is the gradient of its output, what is returned that of its input."""
        gradient = grads.pop()
        assert gradient is not None
        # Held by `gradient` and getrefcount's argument; the storage by the tensor and the argument.
        if getrefcount(gradient) != 2 or getrefcount(gradient.storage) != 2:
            raise Unrecordable("the incoming gradient is held by others too")
        recording = layer.recording = self._settled(layer.recording)
        if Incoming.of(gradient) != recording.gradient:
            recording = layer.recording = self._with_gradient(layer, Incoming.of(gradient))
        layer.gradient = gradient
        del gradient
        self._run_backward(layer)
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
            self.recordings[key] = record(self.decoder, self.rule, index, self.members[index], *layer.source, gradient)
        found = self.recordings[key]
        if found is None or found.num_storages > first.num_storages + SPARE:
            raise Unrecordable("another gradient makes another backward")
        return found

    def _run_backward(self, layer: _Layer) -> None:
        """With the parameters' gradients one by one, or, where the strategy has nothing to do at them, together."""
        recording, trained = layer.recording, self.trained[layer.index]
        if trained is None or trained.gradients is not recording.gradients:
            trained = self.trained[layer.index] = _Trained(recording.gradients, self.members[layer.index])
        parameters = trained.parameters
        arrival = self.rule.quiet_gradients(layer.index)
        missing = [not p.accumulator.has_grad for p in parameters]
        if arrival is not None:
            if not all(missing):
                arrival = LATER if arrival is KEPT and not any(missing) else None
            elif arrival is KEPT:
                arrival = FIRST
        if arrival is None:
            loud = self.rule.loud_gradient(parameters) if all(missing) else None
            self._run_unmerged(layer, parameters, loud)
            return
        if arrival not in recording.merged:
            recording.merged[arrival] = merged_backward(recording, arrival)
            self._place(recording.merged[arrival])
        self._run_with_hooks(layer, recording.merged[arrival], None, arrival)
        if arrival is FIRST and parameters:
            if recording.kept is None:
                recording.kept = Kept(trained.in_order, recording.module)
            KeptTogether(self.trace, recording.kept, layer.first, layer.module, trained.accumulators)
        if self.rule.told:
            self.rule.grads_ready(parameters)

    def _run_unmerged(self, layer: _Layer, parameters: list[Parameter], loud: int | None) -> None:
        """``loud``: at this gradient alone the strategy has something to do; of those before it is told first."""
        recording = layer.recording
        if not recording.backward_placed:
            recording.backward_placed = True
            self._place(recording.backward)
        if loud is not None:
            if not recording.arrivals:
                recording.arrivals = quiet_arrivals(recording)
                self._place(list(recording.arrivals.values()))
            layer.passed_on = {**recording.arrivals}
            del layer.passed_on[recording.gradients[loud][0]]
            self.rule.grads_ready(parameters[:loud])
        self._run_with_hooks(layer, recording.backward, None, BACKWARD)
        if loud is not None:
            self.rule.grads_ready(parameters[loud + 1 :])

    def _run_with_hooks(self, layer: _Layer, steps: Sequence[Instruction], x: Tensor | None, key: str) -> None:
        """Hooks and events between them as rounds, once some are kept and as long as they repeat.

        ``key``: which of the recording's lists ``steps`` is.
        """
        rule, recording, block = self.rule, layer.recording, layer.index
        if not rule.module_hooks or not rule.hooks_repeat(block):
            self._run(layer, steps, x)
        elif key not in recording.rounds:
            own = recording.num_storages
            spare = own + SPARE + (0 if key is FORWARD else self.num_hook_storages)
            recorder = RoundRecorder(self.trace, layer.module, layer.first, own, spare, self.num_hook_storages)
            recorder.listen(steps, lambda part: self._run(layer, part, x))
            kept = recording.rounds[key] = recorder.rounds if rule.hooks_repeat(block) else None
            self._place(kept.steps if kept else ())
        elif (rounds := recording.rounds[key]) is None:
            self._run(layer, steps, x)
        else:
            self._run(layer, rounds.steps, x)
            rule.count_hooks(layer.module, rounds.hooks)

    def _run(self, layer: _Layer, instructions: Sequence[Instruction], x: Tensor | None) -> None:
        play, first, module, rule = self.trace.events.append, layer.first, layer.module, self.rule
        members, held, passed_on = self.members[layer.index], layer.held, layer.passed_on
        for step in instructions:
            if isinstance(step, Play):
                play((SEGMENT, first, step.segment.place, module, "", 0))
            elif isinstance(step, Pass):
                (rule.after_backward if step.entering else rule.before_backward)(module + step.module)
            elif isinstance(step, Hook):
                if step.entering:
                    rule.before_forward(module + step.module, step.needs_gradient)
                else:
                    rule.after_forward(module + step.module)
            elif isinstance(step, Hold):
                if step.let_go:
                    del held[step.index]
                else:
                    held[step.index] = members[step.parameter].tensor
            elif isinstance(step, Gradient):
                if step.parameter in passed_on:
                    play((SEGMENT, first, passed_on[step.parameter].segment.place, module, "", 0))
                    continue
                members[step.parameter].accumulator.backward([self._adopt(step.value, layer)])
            elif isinstance(step, Outer):
                self._outer(layer, step, x)
            elif isinstance(step, Workspace):
                self.ops.workspaces.take(step.key, step.nbytes)

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
        label = layer.names.get(value.label)
        if label is None:
            label = layer.names[value.label] = layer.renamed(value.label)
        return value.adopt(self.trace, layer.first, label)
