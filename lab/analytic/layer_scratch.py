"""A scratch world for one block: stand-ins for the trace, the tape, the strategy and the parameters of a run.

Each stand-in notes, between the events, what the real one would have done (``lab.analytic.layer_instructions``).
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

from lab.analytic.accumulator import Accumulator
from lab.analytic.decoder import Decoder
from lab.analytic.layer_instructions import Gradient, Hold, Hook, Instruction, Pass, Unrecordable, Value, Workspace
from lab.analytic.linears import Linears
from lab.analytic.ops import Ops, Parameter
from lab.analytic.ops_base import Workspaces
from lab.analytic.sharding.base import Rule
from lab.analytic.tape import Grads, Node, Storage, Tape, Tensor, Trace
from lab.vocab import MemoryCategory

NOTE = 100  # kind of an event that stands for an instruction; its second field is the index in ``notes``


class ScratchTrace(Trace):
    """A trace with instructions between its events."""

    __slots__ = ("notes",)

    def __init__(self, of: Trace) -> None:
        super().__init__(of.alignment, of.on_device_kernels)
        self.notes: list[Instruction | Value] = []

    def note(self, what: Instruction | Value) -> None:
        self.events.append((NOTE, len(self.notes), 0, "", "", 0))
        self.notes.append(what)


class _Ghost(Storage):
    """Stands for a parameter's storage that is saved; says when it is let go of."""

    __slots__ = ("hold",)

    def __init__(self, trace: ScratchTrace, category: MemoryCategory, parameter: str) -> None:
        super().__init__(trace, 0, category, "")
        self.hold = Hold(len(trace.notes), parameter, False)
        trace.note(self.hold)

    def __del__(self) -> None:
        if isinstance(self.trace, ScratchTrace):
            self.trace.note(Hold(self.hold.index, self.hold.parameter, True))


class _ScratchTape(Tape):
    def __init__(self, trace: ScratchTrace, swapped: bool) -> None:
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
    """What ``Rule.enter`` and ``leave`` do to a graph: nothing, or a node each (``Rule.module_hooks``)."""

    def __init__(self, trace: ScratchTrace, tape: Tape, own: str, called: bool) -> None:
        self.trace, self.tape, self.own, self.called = trace, tape, own, called

    def enter(self, module: str, x: Tensor) -> Tensor:
        return self._hook(module, x, entering=True)

    def leave(self, module: str, y: Tensor) -> Tensor:
        return self._hook(module, y, entering=False)

    def _hook(self, module: str, x: Tensor, entering: bool) -> Tensor:
        if not self.called:
            return x
        if not module.startswith(self.own + "."):
            raise Unrecordable(f"{module} is not of the block")
        self.trace.note(Hook(module[len(self.own) :], entering, x.node is not None))
        if x.node is None:
            return x
        place = Pass(module[len(self.own) :], entering)

        def backward(grads: Grads) -> Grads:
            self.trace.note(place)
            return [grads[0]]

        return x.view(node=Node(self.tape, [x], backward))

    def leaf(self, module: str, y: Tensor) -> Tensor:
        return y

    def pre_forward(self, unit: int) -> None: ...
    def enter_source(self, module: str) -> None: ...

    def post_forward(self, unit: int, out: Tensor) -> Tensor:
        return out

    def wrap_input(self, unit: int, x: Tensor) -> Tensor:
        return x


class _ScratchAccumulator(Accumulator):
    """Notes the gradient and gives it up at once: who holds it from here on is the strategy's affair."""

    __slots__ = ("suffix", "trace")

    def __init__(self, name: str, suffix: str, trace: ScratchTrace) -> None:
        super().__init__(name)
        self.suffix, self.trace = suffix, trace

    def backward(self, grads: Grads) -> Grads:
        assert grads[0] is not None
        self.trace.note(Gradient(self.suffix, Value.of(grads[0])))
        grads[0] = None
        return []


class _ScratchWorkspaces(Workspaces):
    """Notes where one would be made that the live run does not have yet."""

    def __init__(self, tape: Tape, trace: ScratchTrace, live: Workspaces) -> None:
        super().__init__(tape)
        self.trace, self.live = trace, live
        self.noted: set[str] = set()

    def take(self, key: str, nbytes: int) -> None:
        if key not in self.live.taken and key not in self.noted:
            self.noted.add(key)
            self.trace.note(Workspace(key, nbytes))


@dataclass
class ScratchRun:
    """One block in a scratch world."""

    decoder: Decoder
    ops: Ops
    tape: _ScratchTape
    trace: ScratchTrace
    params: dict[str, Parameter]
    workspaces: _ScratchWorkspaces


def scratch_world(decoder: Decoder, rule: Rule, own: str, members: dict[str, Parameter]) -> ScratchRun:
    live_ops = decoder.ops
    trace = ScratchTrace(live_ops.tape.trace)
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
    workspaces = _ScratchWorkspaces(tape, trace, live_ops.workspaces)
    ops.tape, ops.cast_cache, ops.workspaces = tape, {}, workspaces
    hooks = _ScratchHooks(trace, tape, own, called=rule.module_hooks)
    alone = copy(decoder)
    alone.ops, alone.p, alone.hooks = ops, params, hooks
    alone.linears = Linears(decoder.cfg, ops, params, hooks)
    return ScratchRun(alone, ops, tape, trace, params, workspaces)
