"""The words of the lab: categories, levels, phases, strategies. Standard library only.

Every table, record, plot and config uses these names and no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum


class MemoryCategory(StrEnum):
    """What a byte of device memory is for. The order is the order of tables and stacks."""

    PARAMETERS = "parameters"
    MASTER_WEIGHTS = "master_weights"  # fp32 copies of lower-precision parameters
    GRADIENTS = "gradients"
    OPTIMIZER_STATES = "optimizer_states"
    QUANTIZATION_STATE = "quantization_state"  # absmax, codebooks
    ACTIVATIONS = "activations"  # saved for backward
    LOGITS_AND_LOSS = "logits_and_loss"
    GATHERED_PARAMETERS = "gathered_parameters"  # all-gathered shards
    COMM_BUFFERS = "comm_buffers"  # DDP / ZeRO buckets
    TEMPORARIES = "temporaries"
    LIBRARY_WORKSPACES = "library_workspaces"  # cuBLAS and friends, through the allocator


class MemoryLevel(StrEnum):
    """Where memory is read: allocated <= active <= reserved <= device_used. Never mixed in one sum."""

    ALLOCATED = "allocated"
    ACTIVE = "active"
    RESERVED = "reserved"
    DEVICE_USED = "device_used"


class StepPhase(StrEnum):
    """A training step's phases, in order; ``build`` comes once, before the first step."""

    BUILD = "build"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER_STEP = "optimizer_step"
    ZERO_GRAD = "zero_grad"


STEP_PHASES: tuple[StepPhase, ...] = tuple(p for p in StepPhase if p is not StepPhase.BUILD)


# What lies between two steps (gradients until zero_grad drops them): known by shapes and dtypes alone.
STATE_CATEGORIES: tuple[MemoryCategory, ...] = (
    MemoryCategory.PARAMETERS,
    MemoryCategory.MASTER_WEIGHTS,
    MemoryCategory.GRADIENTS,
    MemoryCategory.OPTIMIZER_STATES,
    MemoryCategory.QUANTIZATION_STATE,
)


class Strategy(StrEnum):
    """How the model is spread over ranks. One file in ``lab/parallel`` may serve several."""

    SINGLE = "single"
    DDP = "ddp"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"
    FSDP = "fsdp"  # FSDP2, reshard after forward
    FSDP_GRAD_OP = "fsdp_grad_op"  # FSDP2, parameters stay gathered from forward to backward
    HSDP = "hsdp"  # FSDP2 over a 2-d mesh: shard inside a group, replicate across groups

    @property
    def zero_stage(self) -> int:
        """1, 2 or 3 under DeepSpeed ZeRO, else 0."""
        return {Strategy.ZERO1: 1, Strategy.ZERO2: 2, Strategy.ZERO3: 3}.get(self, 0)

    @property
    def is_fsdp(self) -> bool:
        return self in (Strategy.FSDP, Strategy.FSDP_GRAD_OP, Strategy.HSDP)


class Precision(StrEnum):
    FP32 = "fp32"
    BF16_MIXED = "bf16_mixed"
    FP16_MIXED = "fp16_mixed"
    BF16_PURE = "bf16_pure"


class Checkpointing(StrEnum):
    NONE = "none"
    FULL = "full"
    EVERY_K = "every_k"
    SELECTIVE = "selective"


class AttentionBackend(StrEnum):
    AUTO = "auto"  # PyTorch's own choice among its SDPA backends
    EAGER = "eager"  # matmul, softmax, matmul written out
    MATH = "math"
    MEM_EFFICIENT = "mem_efficient"
    FLASH = "flash"
    CUDNN = "cudnn"


class RunStatus(StrEnum):
    """How a run ended. ``oom`` is a result, not a failure."""

    OK = "ok"
    OOM = "oom"
    FAILED = "failed"
    TIMEOUT = "timeout"
    INVALID = "invalid"
    INTERRUPTED = "interrupted"


class MemoryBreakdown(dict[MemoryCategory, int]):
    """Bytes by category. Absent categories are zero; ``total_bytes`` is the sum."""

    def __missing__(self, key: MemoryCategory) -> int:
        return 0

    @classmethod
    def of(cls, items: Mapping[str, int] | Iterable[tuple[str, int]]) -> MemoryBreakdown:
        pairs = items.items() if isinstance(items, Mapping) else items
        return cls((MemoryCategory(k), int(v)) for k, v in pairs)

    @property
    def total_bytes(self) -> int:
        return sum(self.values())

    def to_json(self) -> dict[str, int]:
        """Non-zero categories in the vocabulary's order."""
        return {c.value: self[c] for c in MemoryCategory if self[c]}
