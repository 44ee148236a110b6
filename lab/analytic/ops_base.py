"""Parameters as operands, and what every operation is made of: casts, scratch memory, outputs that are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lab.analytic.accumulator import Accumulator
from lab.analytic.reduce import column_partials
from lab.analytic.tape import Grads, Node, Tape, Tensor
from lab.vocab import MemoryCategory

if TYPE_CHECKING:
    from lab.analytic.checkpoint import Region

LOSS = MemoryCategory.LOGITS_AND_LOSS


@dataclass
class Quantized:
    """What dequantizes a weight, as bitsandbytes keeps it outside ``parameters()``."""

    kind: str  # int8 | fp4 | nf4
    numel: int  # of the weight
    block_size: int
    itemsize: int  # of the weight before it was quantized: what dequantizing gives
    nested: bool
    state: list[Tensor]  # absmax (nested: 8 bit, its own absmax, offset) or int8's row maxima


@dataclass
class Parameter:
    """A leaf: its tensor (shared storage while it lives) and its gradient accumulator."""

    name: str
    shape: tuple[int, ...]
    tensor: Tensor
    accumulator: Accumulator
    trainable: bool = True
    quantized: Quantized | None = None  # set: ``tensor`` holds packed bytes

    @property
    def numel(self) -> int:
        """Elements of the tensor that is stored; packed ones with a quantized weight."""
        return self.tensor.numel

    def leaf(self) -> Tensor:
        """The parameter as an operand: without a node when frozen."""
        return Tensor(
            self.tensor.storage, self.tensor.numel, self.tensor.itemsize, self.accumulator if self.trainable else None
        )


class Workspaces:
    """What libraries keep for good, by library and thread: made when it is first needed."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.taken: dict[str, Tensor] = {}

    def take(self, key: str, nbytes: int) -> None:
        if key not in self.taken:
            self.taken[key] = self.tape.new(nbytes, 1, key, MemoryCategory.LIBRARY_WORKSPACES)


@dataclass
class BaseOps:
    """What the operations are made of, bound to one tape and one precision regime.

    ``amp`` is the autocast element size, or None outside autocast. Autocast keeps the cast of every
    leaf parameter until the outermost context ends (aten/src/ATen/autocast_mode.cpp, cached_cast);
    ``cast_cache`` is that cache.
    """

    tape: Tape
    amp: int | None = None
    cast_cache: dict[str, Tensor] = field(default_factory=dict)
    linear_keeps_parameter: bool = False  # DeepSpeed's LinearFunctionForZeroStage3
    num_streaming_multiprocessors: int = 0  # a row of the hardware table
    half_is_fp16: bool = False  # what has 2 bytes per element is fp16, not bf16
    workspace_bytes: int = 0
    lt_workspace_bytes: int = 0
    workspaces: Workspaces = field(init=False)
    region: Region | None = None  # the checkpointed region being run

    def __post_init__(self) -> None:
        self.workspaces = Workspaces(self.tape)

    # -- helpers -----------------------------------------------------------------------------

    def new(
        self, numel: int, itemsize: int, label: str, category: MemoryCategory = MemoryCategory.TEMPORARIES
    ) -> Tensor:
        return self.tape.new(numel, itemsize, label, category)

    def scratch(self, nbytes: int, label: str) -> None:
        """Memory that a kernel takes and gives back; only a real allocator sees it."""
        if nbytes and self.tape.trace.on_device_kernels:
            self.new(nbytes, 1, label)

    def column_sum(self, rows: int, columns: int) -> None:
        """The scratch memory of sum(dim=0) over [rows, columns]: a bias gradient."""
        if self.tape.trace.on_device_kernels:
            sizes = column_partials(rows, columns, self.num_streaming_multiprocessors)
            held = [self.new(n, 1, "column sum") for n in sizes]
            del held

    def matmul_workspace(self, thread: str, lt: bool) -> None:
        """cuBLAS takes its workspace at the first product of each thread, which has a handle of its own, and keeps it.

        addmm with a bias goes through cuBLASLt (cuda/Blas.cpp), which has another one. A checkpointed region runs again
        on backward's thread: its products may be the first there (chunked loss).
        """
        if self.region is not None and self.region.replaying:
            thread = "backward"
        for library, nbytes in (("cuBLAS", self.workspace_bytes), ("cuBLASLt", self.lt_workspace_bytes if lt else 0)):
            key = f"{library} workspace, {thread} thread"
            if nbytes:
                self.workspaces.take(key, nbytes)

    def gradient_as_rows(self, x: Tensor, label: str) -> Tensor:
        """x as its product gave it, whose gradient comes in another order of memory: its view as rows is a copy."""
        numel, size, tape = x.numel, x.itemsize, self.tape
        return x.view(node=tape.node([x], lambda _: [tape.new(numel, size, label + " gradient, contiguous")]))

    def cast(self, x: Tensor, itemsize: int, label: str) -> Tensor:
        """x.to(dtype): nothing is kept; backward casts the gradient back."""
        if x.itemsize == itemsize:
            return x
        y = self.new(x.numel, itemsize, label, kept_as(x))
        if x.node is not None:
            back_size, numel, tape = x.itemsize, x.numel, self.tape
            category = kept_as(x)

            def backward(grads: Grads) -> Grads:
                return [tape.new(numel, back_size, label + " gradient", category)]

            y.node = Node(tape, [x], backward)
        return y

    def cast_alone(self, x: Tensor, itemsize: int, label: str) -> Tensor:
        """x.to(dtype) where no graph is made; x itself if it has that type."""
        return x if x.itemsize == itemsize else self.new(x.numel, itemsize, label, kept_as(x))

    def weight(self, p: Parameter) -> Tensor:
        """The parameter as an operand under autocast: its cached cast. A frozen one's is made anew for every use."""
        if self.amp is None or self.amp == p.tensor.itemsize:
            return p.leaf()
        if not p.trainable:
            return self.cast(p.leaf(), self.amp, f"autocast copy of {p.name}")
        if p.name not in self.cast_cache:
            self.cast_cache[p.name] = self.cast(p.leaf(), self.amp, f"autocast copy of {p.name}")
        t = self.cast_cache[p.name]
        return Tensor(t.storage, t.numel, t.itemsize, t.node)

    def unary(self, x: Tensor, label: str, save_input: bool, grad_label: str) -> Tensor:
        """One elementwise operation that keeps its input or nothing."""
        numel, itemsize, tape = x.numel, x.itemsize, self.tape
        node = tape.node([x], lambda _: [tape.new(numel, itemsize, grad_label)], [x] if save_input else [])
        y = self.new(numel, itemsize, label)
        y.node = node
        return y

    def kept_or(
        self, numel: int, itemsize: int, label: str, category: MemoryCategory = MemoryCategory.TEMPORARIES
    ) -> Tensor:
        """The output of a matmul or attention kernel: under a selective policy kept in forward, taken back later."""
        region = self.region
        if region is None or region.kept is None:
            return self.new(numel, itemsize, label, category)
        if region.replaying:
            return region.kept.pop(0).view()
        out = self.new(numel, itemsize, label, MemoryCategory.ACTIVATIONS)
        region.kept.append(out.view())
        return out

    @property
    def dispatch_mode(self) -> bool:
        """Is a Python dispatch mode active: a selective policy's, or the CPU stand-in's? Some operations look."""
        selective = self.region is not None and self.region.kept is not None
        return selective or not self.tape.trace.on_device_kernels

    @property
    def taken_back(self) -> bool:
        """Does no product run, because a selective policy kept its output?"""
        return self.region is not None and self.region.kept is not None and self.region.replaying


def kept_as(x: Tensor) -> MemoryCategory:
    """The category of what is made of x."""
    return LOSS if x.storage.category is LOSS else MemoryCategory.TEMPORARIES
