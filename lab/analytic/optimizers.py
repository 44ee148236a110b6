"""Optimizer state and what one optimizer step allocates for a moment, per implementation: AdamW and SGD.

torch/optim/adamw.py and sgd.py (2.11 and 2.13): state is made at the first step, in parameter order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial

from lab.analytic.segments import Repeated
from lab.analytic.tape import FP32, Event, Tape, Tensor, Trace
from lab.config import OptimizerConfig
from lab.vocab import MemoryCategory

STATES = MemoryCategory.OPTIMIZER_STATES
FOREACH_CHUNK = 65536  # kChunkSize, aten/src/ATen/native/cuda/MultiTensorApply.cuh
Shape = tuple[int, ...]


class Optimizer(ABC):
    """What every optimizer's replay offers.

    ``managed_bytes``: states that no allocator of PyTorch's holds; ``managed_device_bytes``: their room on the GPU.
    """

    def __init__(self, tape: Tape, cfg: OptimizerConfig) -> None:
        self.tape, self.cfg = tape, cfg
        self.states: list[Tensor] = []
        self.made: set[int] = set()  # groups whose states exist
        self.managed_bytes = self.managed_device_bytes = 0

    @abstractmethod
    def step(self, params: Sequence[tuple[int, int]], shapes: Sequence[Shape] | None = None, group: int = 0) -> None:
        """One step of the real optimizer.

        params: (elements, element size) of every tensor with a gradient, in order; shapes: theirs, None for vectors
        (ZeRO's flat partitions). Calls with another ``group`` are steps over other tensors: ZeRO-3's sub-groups.
        """


def foreach_types(sizes: Sequence[int]) -> list[int]:
    """Element sizes of tensors -> those of foreach's groups, one type each, in the order in which they are stepped.

    The type that is seen last comes first: an unordered_map, where libstdc++ puts new keys in front (ForeachUtils.h,
    _group_tensors_by_first_tensors_device_and_dtype).
    """
    return list(dict.fromkeys(sizes))[::-1]


class TorchOptimizer(Optimizer):
    """AdamW or SGD over flat tensors: ``step`` replays torch.optim's allocations.

    AdamW: exp_avg and exp_avg_sq in the parameter's type, and a step counter per parameter (fp32, 4 B) that is
    on the GPU only when fused. SGD: a momentum buffer, unless momentum is 0 (made as a clone of the
    gradient). Fused steps allocate nothing; foreach AdamW takes sqrt(exp_avg_sq) of all parameters at once;
    the for-loop takes two such tensors of one parameter, and keeps the last until the next is made.
    """

    def __init__(self, tape: Tape, cfg: OptimizerConfig) -> None:
        super().__init__(tape, cfg)
        self._kinds: dict[int, Repeated] = {}  # states of a parameter, by its bytes

    def step(self, params: Sequence[tuple[int, int]], shapes: Sequence[Shape] | None = None, group: int = 0) -> None:
        new, implementation = self.tape.new, self.cfg.implementation
        first = group not in self.made
        self.made.add(group)
        if self.cfg.kind == "sgd":
            self._sgd(params, first)
            return
        if first:
            self._make_states(params)
        if implementation == "foreach":
            held: list[Tensor] = []  # a variable of the loop over types: one's until the next one's are there
            for kind in foreach_types([size for _, size in params]):
                held = [new(n, size, "sqrt(exp_avg_sq)") for n, size in params if size == kind]
            del held
        elif implementation == "for_loop":
            denominator: Tensor | None = None
            for n, size in params:
                root = new(n, size, "sqrt(exp_avg_sq)")
                quotient = new(n, size, "AdamW denominator")
                del root
                denominator = quotient
                del quotient
            del denominator

    def _sgd(self, params: Sequence[tuple[int, int]], first: bool) -> None:
        """Weight decay adds parameters to copies of gradients: those of a type at once (foreach) or one by one."""
        decayed = self.cfg.implementation != "fused" and self.cfg.weight_decay > 0
        groups: Iterable[Sequence[tuple[int, int]]] = [[p] for p in params]
        if self.cfg.implementation == "foreach":  # device_grads is bound anew before the next type's copies are made
            groups = ([p for p in params if p[1] == size] for size in foreach_types([size for _, size in params]))
        for group in groups:
            held = [self.tape.new(n, size, "gradient plus weight decay") for n, size in group] if decayed else []
            if first:
                self._make_states(group)
            del held

    def _make_states(self, params: Sequence[tuple[int, int]]) -> None:
        """They stay for good: nobody has to own them."""
        trace, kinds = self.tape.trace, self._kinds
        for nbytes in [n * size for n, size in params]:
            if nbytes not in kinds:
                kinds[nbytes] = Repeated(trace, partial(self._make_states_of, nbytes))
            kinds[nbytes].play(trace)

    def _make_states_of(self, nbytes: int, trace: Trace) -> list[Event]:
        """Of a parameter of so many bytes."""
        if self.cfg.kind == "adamw":
            if self.cfg.implementation == "fused" or not trace.on_device_kernels:
                trace.allocate(FP32, STATES, "step")
            trace.allocate(nbytes, STATES, "exp_avg")
            trace.allocate(nbytes, STATES, "exp_avg_sq")
        elif self.cfg.momentum:
            trace.allocate(nbytes, STATES, "momentum_buffer")
        return []


def clip_gradients(tape: Tape, gradients: Sequence[tuple[int, int]], sharded: bool = False) -> Tensor:
    """torch.nn.utils.clip_grad_norm_: a norm per gradient, their stack, the total and the coefficient.

    ``gradients``: (elements, element size). Scalars in their type, and on a GPU a partial norm in fp32 per chunk of
    65536 elements, for every gradient as many as the largest has (ForeachReduceOp.cu, foreach_tensor_norm_cuda).
    foreach multiplies in place. Returns the total norm, which the caller may keep.

    ``sharded``: DTensors, each rank's norms of its shards, whose squares are summed over the ranks before the total
    (torch/distributed/tensor/_ops/_math_ops.py, _NormPartial).
    """
    norms = []
    for itemsize in dict.fromkeys(size for _, size in gradients):  # a foreach call per type
        group = [numel for numel, size in gradients if size == itemsize]
        partial = len(group) * max(-(-numel // FOREACH_CHUNK) for numel in group) if tape.trace.on_device_kernels else 0
        sums = tape.new(partial, FP32, "gradient norms, partial") if partial else None
        norms += [tape.new(1, itemsize, "gradient norm") for _ in group]
        del sums
    itemsize = max(size for _, size in gradients)
    stacked = tape.new(len(norms), itemsize, "gradient norms")
    if sharded:  # the powers, a copy that all-reduce writes into, the roots
        reduced = [tape.new(len(norms), itemsize, "gradient norms") for _ in range(3)]
        del reduced
    total = tape.new(1, itemsize, "total norm")
    del stacked
    norms.clear()
    # max_norm / (total + 1e-6) is a reciprocal and a product; clamp
    sums, reciprocal = tape.new(1, itemsize, "clip coefficient"), tape.new(1, itemsize, "clip coefficient")
    coefficient = tape.new(1, itemsize, "clip coefficient")
    del reciprocal, sums
    clamped = tape.new(1, itemsize, "clip coefficient")
    del coefficient, clamped
    return total
