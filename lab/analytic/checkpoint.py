"""Non-reentrant activation checkpointing over the symbolic tape.

torch/utils/checkpoint.py, use_reentrant=False: the forward keeps the region's inputs only; the first
backward node of the region that needs a saved tensor runs the region again until the last saved
tensor has been made (early stop) and hands the tensors out one by one.

Selective (create_selective_checkpoint_contexts) also keeps the outputs of matmuls and of the attention
kernel from the forward; the recomputation takes them from there instead of running those operations.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

from lab.analytic.ops import Ops
from lab.analytic.tape import Node, Tensor
from lab.vocab import MemoryCategory


class _Stop(Exception):
    """The last saved tensor exists: the rest of the region is not needed (_StopRecomputationError)."""


class Region:
    """One checkpointed call: which node needs how many saved tensors, and what a selective policy kept.

    Nodes are held weakly, as the frame there holds its placeholders: a graph that the region itself drops (DoRA's
    weight update) gets nothing handed out.
    """

    def __init__(self, selective: bool) -> None:
        self.owners: list[ref[Node]] | None = []
        self.kept: list[Tensor] | None = [] if selective else None
        self.replaying = False


def checkpoint(ops: Ops, run: Callable[[Tensor], Tensor], x: Tensor, selective: bool) -> Tensor:
    """run(x), keeping x instead of what ``run`` saves.

    x and what a selective policy kept stay until the region's last node has run: every saved tensor's
    hook refers to the frame that holds them.
    """
    tape = ops.tape
    region = Region(selective)
    amp = ops.amp

    def pack(node: Node, tensor: Tensor) -> None:
        assert region.owners is not None
        region.owners.append(ref(node))
        node.unpack = unpack

    def unpack() -> None:
        if region.owners is not None:
            _recompute(ops, run, held[0], region, amp, needs_gradient)

    if x.storage.category is MemoryCategory.TEMPORARIES:
        x.storage.move(MemoryCategory.ACTIVATIONS)
    held, needs_gradient = [x.view()], x.node is not None
    outer, outer_region = tape.pack, ops.region
    tape.pack, ops.region = pack, region
    try:
        return run(x)
    finally:
        tape.pack, ops.region = outer, outer_region


def _recompute(
    ops: Ops, run: Callable[[Tensor], Tensor], x: Tensor, region: Region, amp: int | None, needs_gradient: bool
) -> None:
    """Run the region on its input again and give every node of the first run its saved tensors."""
    tape = ops.tape
    owners = region.owners
    assert owners is not None
    region.owners = None
    made: list[Tensor | None] = []

    def pack(node: Node, tensor: Tensor) -> None:
        if tensor.storage.category is MemoryCategory.TEMPORARIES:
            tensor.storage.move(MemoryCategory.ACTIVATIONS)
        if owners[len(made)]() is None:
            node.saved.append(tensor.view())  # this run's own graph holds it, until the region drops that one too
            made.append(None)
        else:
            made.append(tensor.view())
        if len(made) == len(owners):
            raise _Stop

    # The region runs under its own autocast context, whose cache ends with it.
    outer = tape.pack, ops.cast_cache, ops.amp, ops.region
    tape.pack, ops.cast_cache, ops.amp, ops.region = pack, {}, amp, region
    region.replaying = True
    seq = tape.seq_state()
    try:
        source = Node(tape, [], lambda g: []) if needs_gradient else None  # as the region's input did
        run(Tensor(x.storage, x.numel, x.itemsize, source))
    except _Stop:
        pass
    finally:
        tape.pack, ops.cast_cache, ops.amp, ops.region = outer
        tape.restore_seq(seq)
    for owner, tensor in zip(owners, made, strict=True):
        node = owner()
        if node is not None and tensor is not None:
            node.saved.append(tensor)
    made.clear()
