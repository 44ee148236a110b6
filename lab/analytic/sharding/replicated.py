"""`single` and `ddp`: every rank holds everything; DDP adds flat gradient buckets."""

from __future__ import annotations

from collections.abc import Sequence

from lab.analytic.architecture import ParameterSpec
from lab.analytic.families.inventory import buffers
from lab.analytic.ops import Parameter
from lab.analytic.sharding.base import KEPT, Rule
from lab.analytic.tape import Tensor
from lab.units import MIB
from lab.vocab import MemoryCategory, Precision

BROADCAST_BYTES = 250 * MIB  # distributed.py, broadcast_bucket_size


class Single(Rule):
    """One process. Parameters, gradients and optimizer state in full."""


class DDP(Rule):
    """DistributedDataParallel (torch/csrc/distributed/c10d/reducer.cpp).

    Gradients are copied into flat buckets, which live as long as the model: a second copy of all gradients.
    With ``gradient_as_bucket_view`` each gradient, once made, is moved into its bucket and becomes a view of it.
    The first backward has one bucket for everything (distributed.py, _ddp_init_helper); at the next forward the
    buckets are made anew in the order in which gradients arrived, ``bucket_cap_mb`` each (the first would be
    1 MiB only if DDP were left to its default cap; the lab passes it).

    On NCCL the first backward's bucket may outlive them: its all-reduce's Work holds it until the watchdog (every
    100 ms) has seen it done, and the main thread lets go at its next collective (ProcessGroupNCCL.cpp,
    stashed_for_allocator_safety_). With ``release_first_bucket`` the lab waits for the watchdog before they are made:
    the next collective is then the broadcast of the new buckets' order (reducer.cpp, sync_bucket_indices), and the
    old bucket goes before the new ones are made. Otherwise it is the first all-reduce after that here; in a run the
    watchdog may pass earlier (a slow first optimizer step), or later (very fast steps).

    ``static_graph``: the first backward only counts what is used, in a map of its own; gradients go into the bucket
    when it is over (delay_all_reduce). They arrive one by one in the second step, so the third makes the buckets anew.
    """

    repeats_from = 2  # the second step makes the buckets anew

    def build(self) -> None:
        super().build()
        self._compare_shapes()
        self._broadcast()
        self.arrived: list[ParameterSpec] = []
        self.rebuilt = False
        self.buckets = self.first_buckets()
        self.first_bucket: list[Tensor] = []
        self.reduced = 0  # elements of gradients that came since the buckets were made anew
        self.begun = 0  # steps
        self.used: list[Tensor] = []
        if self.cfg.parallel.ddp.static_graph:
            self.repeats_from = self.steady_step = 3
        if self.counts_used:  # initialize_local_used_map: one on the host, one on the device
            maps = 1 if self.tape.trace.on_device_kernels else 2
            category = MemoryCategory.COMM_BUFFERS
            self.used = [self.tape.new(len(self.trained), 4, "DDP used-parameter map", category) for _ in range(maps)]

    @property
    def counts_used(self) -> bool:
        """Is there a map of the parameters that were used (reducer.cpp, the constructor)?"""
        return self.cfg.parallel.ddp.static_graph

    def first_buckets(self) -> list[Tensor]:
        """One for everything: what no unused parameters are looked for is made anew anyway."""
        return self._buckets(self.trained, [sum(s.numel * self.itemsize_of(s) for s in self.trained)])

    def _compare_shapes(self) -> None:
        """_verify_param_shape_across_processes: how many parameters each rank has, then sizes and strides, on a GPU.

        Source: torch/csrc/distributed/c10d/reducer.cpp, verify_params_across_processes; NCCL gathers into one tensor.
        """
        if not self.tape.trace.on_device_kernels:
            return
        counts = [self.tape.new(1, 8, "DDP parameter counts") for _ in range(1 + self.world)]
        self.tape.new(self.world, 8, "DDP parameter counts")
        self.tape.new(2 * sum(len(s.shape) for s in self.trained), 8, "DDP parameter shapes")
        del counts

    def _broadcast(self) -> None:
        """_sync_module_states: flat copies of up to 250 MiB (and the parameter that fills one), two at a time.

        flatten_dense_tensors of one tensor is a view of it, no copy (torch/csrc/utils/tensor_flatten.h).
        """
        flying: list[Tensor | None] = []
        states = [self._stored(s) for s in self.specs]
        if self.cfg.parallel.ddp.broadcast_buffers:
            states += [(numel, size, "") for _, numel, size in buffers(self.cfg)]
        buckets = self._assign(states, [BROADCAST_BYTES])
        for _, numel, size, count in sorted(buckets):
            if len(flying) == 2:
                flying.pop(0)
            category = MemoryCategory.COMM_BUFFERS
            flying.append(self.tape.new(numel, size, "DDP broadcast", category) if count > 1 else None)
        while flying:
            flying.pop(0)

    def _stored(self, spec: ParameterSpec) -> tuple[int, int, str]:
        """Elements, their size, and their type where it is not the run's own of that size: of packed weights."""
        tensor, packed = self.parameters[spec.name].tensor, self.cfg.quantization.storage_dtype
        half = "fp16" if self.cfg.precision.kind is Precision.FP16_MIXED else "bf16"
        other = spec.quantized not in ("", "int8") and packed in ("fp16", "bf16") and packed != half
        return tensor.numel, tensor.itemsize, packed if other else ""

    def _buckets(self, order: list[ParameterSpec], caps: list[int]) -> list[Tensor]:
        category = MemoryCategory.COMM_BUFFERS
        sizes = self._assign([(s.numel, self.itemsize_of(s), "") for s in order], caps)
        return [self.tape.new(numel, size, "DDP bucket", category) for _, numel, size, _ in sizes]

    def _assign(self, tensors: list[tuple[int, int, str]], caps: list[int]) -> list[tuple[int, int, int, int]]:
        """compute_bucket_assignment_by_size: a bucket closes when it reaches its cap, in bytes; one type each.

        (elements, element size, type) of tensors -> (first tensor, elements, element size, tensors) of buckets, in the
        order in which they close. Every type counts through the caps by itself.
        """
        done: list[tuple[int, int, int, int]] = []
        filled: dict[tuple[int, str], tuple[int, int, int, int]] = {}
        left: dict[tuple[int, str], list[int]] = {}
        for i, (numel, size, name) in enumerate(tensors):
            kind = size, name
            first, elements, _, count = filled.get(kind, (i, 0, size, 0))
            filled[kind] = (first, elements + numel, size, count + 1)
            own = left.setdefault(kind, caps)
            if (elements + numel) * size >= own[0]:
                done.append(filled.pop(kind))
                left[kind] = own[1:] or own
        return done + list(filled.values())

    @property
    def released(self) -> bool:
        """Does the engine wait, before the buckets are made anew, until the first one is nobody's but DDP's?"""
        return self.cfg.parallel.ddp.release_first_bucket

    def bucket_caps(self) -> list[int]:
        """Caps in bytes of the buckets made in the second step; the last one holds for all that follow."""
        return [int(self.cfg.parallel.ddp.bucket_cap_mb * MIB)]

    @property
    def reduces(self) -> bool:
        """Does this micro-step's backward reduce? Until the last, no_sync leaves gradients to themselves."""
        return self.last_micro_step

    @property
    def _delays(self) -> bool:
        return self.cfg.parallel.ddp.static_graph and self.begun == 1

    def quiet_gradients(self, block: int) -> str | None:
        busy = self.first_bucket or self.cfg.parallel.ddp.gradient_as_bucket_view
        return None if busy and self.reduces else KEPT

    def grad_ready(self, spec: ParameterSpec, parameter: Parameter) -> None:
        if self._delays:
            return
        if not self.rebuilt and self.reduces:
            if len(self.arrived) < len(self.trained):
                self.arrived.append(spec)
        elif self.first_bucket and self.reduces:
            self.reduced += spec.numel
            if self.reduced >= self.buckets[0].numel:
                self.first_bucket.clear()
        if self.cfg.parallel.ddp.gradient_as_bucket_view and self.reduces:
            parameter.accumulator.grad = None

    def grads_ready(self, parameters: Sequence[Parameter]) -> None:
        if self.reduces and not self.rebuilt and not self._delays:
            arriving = [self.spec_of[p.name] for p in parameters]
            self.arrived += arriving[: len(self.trained) - len(self.arrived)]

    def finish_backward(self) -> None:
        if self.reduces:  # until then gradients are tensors of their own, beside the buckets
            if self._delays and self.cfg.parallel.ddp.gradient_as_bucket_view:
                for spec in self.trained:
                    self.parameters[spec.name].accumulator.grad = None
            self._count_buckets_as(MemoryCategory.GRADIENTS)

    def zero_grad(self) -> None:
        super().zero_grad()
        self._count_buckets_as(MemoryCategory.COMM_BUFFERS)

    def _count_buckets_as(self, category: MemoryCategory) -> None:
        """Bucket views: the buckets are the gradients while there are any, and bare buckets otherwise."""
        if self.cfg.parallel.ddp.gradient_as_bucket_view:
            for bucket in self.buckets:
                bucket.storage.move(category)

    def start_step(self) -> None:
        # Reducer::rebuild_buckets runs at the next forward.
        self.begun += 1
        if self.arrived and not self.rebuilt:
            self.rebuilt, self.reduced = True, 0
            self.first_bucket = self.buckets if self.tape.trace.on_device_kernels and not self.released else []
            self.buckets = []
            self.buckets = self._buckets(self.arrived, self.bucket_caps())
