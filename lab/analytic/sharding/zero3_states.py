"""ZeRO-3's shards: the flat buffers made at construction, and the optimizer's step over them.

Source: DeepSpeed 0.19.8, runtime/zero/stage3.py (class and attribute names below are its own); sizes as in zero3.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from lab.analytic.optimizers import Optimizer
from lab.analytic.reduce import norm_workspace_bytes
from lab.analytic.segments import Played, Repeated
from lab.analytic.sharding.zero3_gather import Sharded, by_block
from lab.analytic.sharding.zero3_reduce import Reducer
from lab.analytic.tape import BOOL, FP32, Event, Tape, Tensor, Trace
from lab.config import RunConfig
from lab.vocab import MemoryCategory, Precision

FP64 = 8  # bytes; zero/utils.py, get_norm_dtype
PARAMETERS, MASTER = MemoryCategory.PARAMETERS, MemoryCategory.MASTER_WEIGHTS
GRADIENTS, TEMPORARIES = MemoryCategory.GRADIENTS, MemoryCategory.TEMPORARIES


def shard_elements(params: list[Sharded]) -> int:
    """Elements of one rank's shards, padding included."""
    return sum([p.shard_numel for p in params])


def sub_groups(params: list[Sharded], size: int) -> list[list[Sharded]]:
    """_create_fp16_sub_groups: a group closes once its shards hold ``size`` elements."""
    groups: list[list[Sharded]] = [[]]
    filled = 0
    for p in params:
        if filled >= size:
            groups.append([])
            filled = 0
        groups[-1].append(p)
        filled += p.shard_numel
    return groups


def _drop(trace: Trace, shards: list[Played]) -> None:
    """list.clear(): the last goes first."""
    while shards:
        shards.pop().give_back(trace)


class ShardedStates:
    """DeepSpeedZeroOptimizer_Stage3.__init__, which takes the place of ``shards`` and empties the list, and ``step``.

    ``params`` are in the optimizer's order; ``sizes``: bytes per element of parameters and of masters.
    """

    def __init__(
        self,
        cfg: RunConfig,
        tape: Tape,
        rank: int,
        params: list[Sharded],
        sizes: tuple[int, int],
        shards: list[Played],
        optimizer: Optimizer,
    ) -> None:
        self.cfg, self.tape, self.size, self.master_size = cfg, tape, *sizes
        self.global_norm: Tensor | None = None  # _global_grad_norm, of the optimizer and of the engine
        new, size, master, options = tape.new, self.size, self.master_size, cfg.parallel.zero
        self.tracker = new(1, BOOL, "inf_or_nan_tracker")
        if tape.trace.on_device_kernels:  # torch 2.11: ProcessGroup.hpp, barrier keeps its tensor in a static variable
            self.barrier = new(1, BOOL, "tensor of the barrier")
            _drop(tape.trace, shards)  # defragment goes through the host
            tape.trace.empty_cache()
        self.flat = new(shard_elements(params), size, "lp_param_buffer", PARAMETERS)
        _drop(tape.trace, shards)
        self.groups = sub_groups(params, options.sub_group_size)
        self.numels = [shard_elements(group) for group in self.groups]
        self.optimizer = optimizer
        self.masters: list[Tensor] = []
        self.blocks = [[tuple(p.shard_numel for p in block) for block in by_block(group)] for group in self.groups]
        self.norms: dict[tuple[int, ...], Repeated] = {}  # by shards of a block: what their norms take for a moment
        converted: Tensor | None = None  # one sub-group's lives until the next one's is there
        for numel in self.numels:
            if master != size:
                converted = new(numel, master, "converted shards", MASTER)
            self.masters.append(new(numel, master, "fp32_partitioned_groups_flat", MASTER))
        del converted
        new(max(self.numels), master, "gradient of initialize_optimizer_states", GRADIENTS)
        self.reducer = Reducer(tape, options, cfg.world_size, rank, size)
        self.gradients = new(shard_elements(params), size, "grad_partitions_flat_buffer", GRADIENTS)

    def step(self) -> list[Tensor]:
        """Norm, then one sub-group after the other; the scalars that live until the step's end, the norm last."""
        new, size, master = self.tape.new, self.size, self.master_size
        if self.cfg.precision.kind is Precision.FP16_MIXED:
            self._check_overflow()
        scalars = self._norms()
        scalars.append(new(1, FP64, "total norm"))
        scalars.append(new(1, FP64, "global gradient norm"))
        for index, (group, numel) in enumerate(zip(self.groups, self.numels, strict=True)):
            flat = new(numel, size, "flat gradient", GRADIENTS) if len(group) > 1 else None
            grad = new(numel, master, "gradient in the masters' type", GRADIENTS) if master != size else flat
            del flat
            if self.cfg.train.max_grad_norm is not None:  # unscale_and_clip_grads
                clip = [new(1, FP64, "clip coefficient") for _ in range(4)]
                del clip
            self.optimizer.step([(numel, master)], group=index)
            del grad
        return scalars

    def _check_overflow(self) -> None:
        """has_overflow: isinf (its absolute value, then a bool per element), then isnan over all gradient shards.

        On the stream of the reductions, whose pool of blocks is its own.
        """
        numel = self.gradients.numel
        self.tape.trace.stream = self.reducer.stream
        if self.tape.trace.on_device_kernels:
            absolute = self.tape.new(numel, self.size, "isinf, absolute value")
            flags = self.tape.new(numel, BOOL, "isinf")
            del absolute
            found = self.tape.new(1, BOOL, "overflow")  # any()
            del flags, found
        self.tape.new(numel, BOOL, "isnan")
        self.tape.trace.stream = 0

    def _norms(self) -> list[Tensor]:
        """get_grad_norm_direct per sub-group, with or without clipping: a gradient shard in fp64 at a time."""
        trace = self.tape.trace
        groups: list[Tensor] = []
        for blocks in self.blocks:
            norms: list[Played] = []
            for shards in blocks:
                if shards not in self.norms:
                    self.norms[shards] = Repeated(trace, partial(self._norms_of, shards))
                norms.append(self.norms[shards].play(trace))
            _drop(trace, norms)
            groups.append(self.tape.new(1, FP64, "sub-group norm"))
        return groups

    def _norms_of(self, shards: Iterable[int], trace: Trace) -> list[Event]:
        """Of shards of so many elements each; what is left are the norms."""
        norms: list[Event] = []
        for numel in shards:
            wide = trace.allocate(numel * FP64, TEMPORARIES, "gradient shard, fp64")
            norms.append(trace.allocate(FP64, TEMPORARIES, "gradient norm"))
            sums = norm_workspace_bytes(numel, self.cfg.hardware.num_streaming_multiprocessors)
            if sums and trace.on_device_kernels:
                partial_sums = trace.allocate(sums, TEMPORARIES, "norm, partial sums")
                trace.free(trace.allocate(FP32, TEMPORARIES, "norm, semaphore"))
                trace.free(partial_sums)
            trace.free(wide)
        return norms
