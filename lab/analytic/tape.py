"""Symbolic tensors and a symbolic autograd engine: PyTorch's lifetimes without PyTorch.

A training step is replayed over tensors that have a size and no data. Allocating and freeing is
recorded in order. Lifetimes are PyTorch's because ownership is: a storage lives as long as a
Python object here refers to it, as libtorch's intrusive pointers do there, and the backward pass
follows the engine's own rules (torch/csrc/autograd/engine.cpp, input_buffer.cpp,
functions/accumulate_grad.cpp):

- ready nodes run in descending order of creation; gradient accumulators run first of all;
- a node's incoming gradients and saved tensors are dropped before its outputs are routed on;
- two gradients of one tensor are added in place when the first is held by nobody else;
- a parameter's first gradient is taken over without a copy, later ones are added in place.

What this leaves out: views make no node of their own here unless their place in the order matters.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from sys import getrefcount
from typing import TYPE_CHECKING

from lab.vocab import MemoryCategory

if TYPE_CHECKING:
    from lab.analytic.segments import Segment

FP32, BF16, INT64, BOOL = 4, 2, 8, 1  # bytes per element; fp16's are bf16's

ALLOC, FREE, MOVE, MARK, EMPTY_CACHE, SEGMENT = 0, 1, 2, 3, 4, 5
IN_USE = 1
Event = tuple[int, int, int, str, str, int]
"""(kind, storage id, bytes, category or mark, label, stream).

FREE repeats the bytes, the category at that time and the label; its last field is IN_USE where the block comes back to
its pool only after its stream's next allocation; MOVE the bytes, with the new category, and the old one
as its label. So each event says by how much it changes which sum. SEGMENT stands for a run of events
(``lab.analytic.segments``), only where ``Trace.shorthand`` allows it: (SEGMENT, first id, index in ``Trace.segments``,
module, "", 0).
"""


class Trace:
    """Events in order. ``alignment`` rounds every size up, as the caching allocator does (512 B on CUDA)."""

    __slots__ = (
        *("alignment", "events", "inplace_accumulation", "next_id", "on_device_kernels", "segments", "shorthand"),
        "stream",
    )

    def __init__(self, alignment: int = 1, on_gpu: bool = True) -> None:
        self.alignment = alignment
        self.events: list[Event] = []
        self.segments: list[Segment] = []
        self.shorthand = False  # may events stand for segments?
        self.next_id = 0
        self.stream = 0  # the allocator keeps a pool per stream
        # The CPU stand-in for the allocator sees tensors, not what a kernel allocates inside itself.
        self.on_device_kernels = on_gpu
        # It also is a dispatch mode, under which the engine adds gradients out of place
        # (input_buffer.cpp asks isTensorSubclassLike, true while a mode is active).
        self.inplace_accumulation = on_gpu

    def allocate(self, nbytes: int, category: MemoryCategory, label: str) -> Event:
        """Bytes without an owner, for what nothing refers to: whoever keeps the event gives them back."""
        event = ALLOC, self.next_id, -(-nbytes // self.alignment) * self.alignment, category, label, self.stream
        self.next_id += 1
        if nbytes:
            self.events.append(event)
        return event

    def free(self, allocated: Event) -> None:
        """Give back what ``allocate`` took."""
        _, ident, size, category, label, _ = allocated
        if size:
            self.events.append((FREE, ident, size, category, label, 0))

    def mark(self, name: str) -> None:
        self.events.append((MARK, -1, 0, name, "", 0))

    def empty_cache(self) -> None:
        """torch.cuda.empty_cache(): segments without a live block go back to the driver."""
        self.events.append((EMPTY_CACHE, -1, 0, "", "", 0))


def aligned(nbytes: int, alignment: int) -> int:
    """Rounded up to a multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment


class Storage:
    """Bytes on the device: allocated when made, freed with the last reference to it."""

    __slots__ = ("category", "id", "label", "live", "nbytes", "size", "trace")

    def __init__(self, trace: Trace, nbytes: int, category: MemoryCategory, label: str) -> None:
        self.trace = trace
        self.nbytes = nbytes
        self.category = category
        self.label = label
        self.live = True
        if nbytes:
            self.id = ident = trace.next_id
            trace.next_id = ident + 1
            self.size = size = -(-nbytes // trace.alignment) * trace.alignment
            trace.events.append((ALLOC, ident, size, category, label, trace.stream))

    @classmethod
    def adopted(cls, trace: Trace, ident: int, nbytes: int, size: int, category: MemoryCategory, label: str) -> Storage:
        """The owner of bytes that an event has allocated already."""
        storage = cls.__new__(cls)
        storage.trace, storage.nbytes, storage.category, storage.label = trace, nbytes, category, label
        storage.id, storage.size, storage.live = ident, size, True
        return storage

    def resize(self, live: bool) -> None:
        """Give the bytes back while references remain, or take them again (untyped_storage().resize_)."""
        trace, nbytes = self.trace, self.nbytes
        if live and not self.live and nbytes:
            self.id = ident = trace.next_id
            trace.next_id = ident + 1
            self.size = size = -(-nbytes // trace.alignment) * trace.alignment
            trace.events.append((ALLOC, ident, size, self.category, self.label, trace.stream))
        elif self.live and not live and nbytes:
            trace.events.append((FREE, self.id, self.size, self.category, self.label, 0))
        self.live = live

    def move(self, category: MemoryCategory) -> None:
        """The same bytes serve another purpose from here on."""
        old = self.category
        if category is not old:
            self.category = category
            if self.live and self.nbytes:
                self.trace.events.append((MOVE, self.id, self.size, category, old, 0))

    def __del__(self) -> None:
        if self.live and self.nbytes:
            self.trace.events.append((FREE, self.id, self.size, self.category, self.label, 0))


class Tensor:
    """A storage with an element count, an element size and the node that made it (None: no gradient).

    ``has_base``: the tensor is a view, and keeps the tensor that it views (autograd tracks that without grad mode
    too), so its storage is never held by it alone.
    """

    __slots__ = ("has_base", "itemsize", "node", "numel", "slot", "storage")

    def __init__(self, storage: Storage, numel: int, itemsize: int, node: Node | None = None, slot: int = 0) -> None:
        self.storage = storage
        self.numel = numel
        self.itemsize = itemsize
        self.node = node
        self.slot = slot
        self.has_base = False

    def view(self, numel: int | None = None, node: Node | None = None, slot: int = 0) -> Tensor:
        """Another tensor over the same storage."""
        return Tensor(self.storage, self.numel if numel is None else numel, self.itemsize, node, slot)


Grads = list["Tensor | None"]
Backward = Callable[[Grads], Grads]
Validate = Callable[[Grads], None]


class Node:
    """One autograd node: ``backward`` maps output gradients to input gradients, then ``saved`` is dropped.

    ``validate``, where there is one, changes those gradients in place: what the engine sums to an input's size or casts
    to its type (engine.cpp, validate_outputs). Of a checkpointed region, recomputed tensors are gone by then: they are
    locals of the node's function.
    """

    is_leaf = False  # the accumulator of a parameter's gradient
    __slots__ = (
        *("__weakref__", "attributes", "backward", "buffer", "deps", "edges", "hooks", "num_slots", "saved", "seq"),
        *("unpack", "validate"),
    )

    def __init__(
        self,
        tape: Tape,
        inputs: Iterable[Tensor | None],
        backward: Backward,
        saved: Iterable[Tensor] = (),
        num_slots: int = 1,
        validate: Validate | None = None,
    ) -> None:
        self.seq = tape.next_seq()
        self.edges = [(t.node, t.slot) if t is not None and t.node is not None else None for t in inputs]
        self.backward: Backward | None = backward
        self.num_slots = num_slots
        self.buffer: Grads | None = None
        self.deps = 0
        self.hooks: list[Callable[[], None]] | None = None
        self.attributes: list[Tensor] | None = None  # of a custom function's context, see Tape.held_by_graph
        self.saved: list[Tensor] = []
        self.unpack: Callable[[], None] | None = None
        self.validate = validate
        for tensor in saved:
            tape.save(self, tensor)


class Tape:
    """Makes nodes in order; ``backward`` runs them.

    ``held_by_graph``: what custom functions keep as attributes of their context (``ctx.tensors = ...``) instead of
    saving it. Backward does not drop that; it goes with the graph, when the caller lets go of the loss.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._seq = 0
        self.held_by_graph: list[Tensor] = []
        self.pack: Callable[[Node, Tensor], None] | None = None  # a checkpointed region's saved-tensor hook

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def seq_state(self) -> int:
        return self._seq

    def restore_seq(self, seq: int) -> None:
        """Forget nodes made since ``seq_state``: a recomputation's graph is never run."""
        self._seq = seq

    def node(
        self,
        inputs: Iterable[Tensor | None],
        backward: Backward,
        saved: Iterable[Tensor | None] = (),
        num_slots: int = 1,
        validate: Validate | None = None,
    ) -> Node | None:
        """A node, unless no input needs a gradient: then there is none, and nothing is saved (frozen parameters)."""
        inputs = list(inputs)
        for t in inputs:
            if t is not None and t.node is not None:
                return Node(self, inputs, backward, [t for t in saved if t is not None], num_slots, validate)
        return None

    def save(self, node: Node | None, tensor: Tensor) -> None:
        """Saved-tensor semantics: the storage is kept and counts as an activation from now on."""
        if node is None:
            return
        if self.pack is not None:
            self.pack(node, tensor)
            return
        if tensor.storage.category is MemoryCategory.TEMPORARIES:
            tensor.storage.move(MemoryCategory.ACTIVATIONS)
        node.saved.append(tensor.view())

    def new(
        self, numel: int, itemsize: int, label: str, category: MemoryCategory = MemoryCategory.TEMPORARIES
    ) -> Tensor:
        return Tensor(Storage(self.trace, numel * itemsize, category, label), numel, itemsize)

    def backward(self, root: Tensor, last: Callable[[], None] | None = None) -> None:
        """Run the graph behind ``root`` (a scalar loss) and free it; then what the engine calls when it is done."""
        assert root.node is not None
        count_dependencies(root.node)
        seed: Grads = [None] * root.node.num_slots
        first = self.new(1, root.itemsize, "loss gradient")  # torch.autograd.backward's frame holds it to the end
        seed[root.slot] = first
        root.node.buffer = seed
        del seed
        start, root.node = [root.node], None
        self.run(start)
        if last is not None:
            last()
        del first

    def run(self, start: list[Node]) -> None:
        """Run one node, which is taken out of ``start``, and all behind it.

        Its incoming gradients are in its buffer and the edges behind it are counted (``count_dependencies``).
        """
        ready = [(-start[0].seq, 0, start.pop())]
        ties = 0
        while ready:
            node = heapq.heappop(ready)[2]
            if node.hooks is not None:
                for hook in node.hooks:
                    hook()
            if node.unpack is not None:
                node.unpack()
            grads = node.buffer
            node.buffer = None
            run = node.backward
            assert grads is not None
            assert run is not None
            outputs = run(grads)
            if node.unpack is not None:
                while node.saved:  # locals of the node's function, the last made dropped first
                    node.saved.pop()
            if node.validate is not None:
                node.validate(outputs)
            while grads:  # a vector's elements go from the first to the last
                grads.pop(0)
            del grads, run
            if not node.is_leaf:
                if node.attributes is not None:
                    self.held_by_graph += node.attributes
                kept, node.saved = node.saved, []
                while kept:  # release_variables() resets them in the order in which they are declared
                    kept.pop(0)
                node.backward = node.unpack = node.validate = None
            edges = node.edges
            del node
            outputs.reverse()
            for edge in edges:
                grad = outputs.pop()
                if edge is None:
                    continue
                target, slot = edge
                if grad is not None:
                    self._add(target, slot, grad)
                del grad
                target.deps -= 1
                if target.deps == 0 and target.buffer is not None:
                    ties += 1
                    heapq.heappush(ready, (-target.seq, ties, target))
                del target

    def _add(self, node: Node, slot: int, grad: Tensor) -> None:
        """InputBuffer::add for ``node``; a parameter's second gradient goes straight into the first."""
        if node.is_leaf and node.buffer is None:
            node.buffer = [grad]
            return
        if node.buffer is None:
            node.buffer = [None] * node.num_slots
        old = node.buffer[slot]
        if old is None:
            node.buffer[slot] = grad
            return
        # Held by the buffer, by `old` here and by getrefcount's argument; the storage by `old` alone.
        alone = getrefcount(old) == 3 and getrefcount(old.storage) == 2 and not old.has_base
        if not (alone and self.trace.inplace_accumulation):
            node.buffer[slot] = self.new(old.numel, max(old.itemsize, grad.itemsize), "accumulated gradient")


def viewed(grad: Tensor | None) -> Tensor | None:
    """The gradient as a view node (reshape, transpose) passes it on."""
    if grad is not None:
        grad.has_base = True
    return grad


def count_dependencies(root: Node) -> None:
    stack, seen = [root], {id(root)}
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            target = edge[0]
            if id(target) not in seen:
                seen.add(id(target))
                target.deps = 0
                stack.append(target)
            target.deps += 1
