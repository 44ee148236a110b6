"""What a run leaves behind: Prediction, RankMeasurement, Residual, RunRecord; JSON, versioned, atomic.

All byte counts are ints; all times are seconds. Nothing here knows how a number was obtained.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from lab.vocab import MemoryBreakdown, RunStatus, StepPhase

SCHEMA_VERSION = 1


@dataclass
class Moment:
    """Allocated bytes at one moment: the total and what it consists of."""

    total_bytes: int
    categories: MemoryBreakdown = field(default_factory=MemoryBreakdown)


@dataclass
class PhasePrediction:
    """Allocated bytes of one phase: at its end and at the peak inside it."""

    end: Moment
    peak: Moment


@dataclass
class StepPrediction:
    """One step: bytes per level at its peak, the categories there, and every phase."""

    allocated_bytes: int
    reserved_bytes: int
    device_used_bytes: int
    categories: MemoryBreakdown
    phases: dict[StepPhase, PhasePrediction]


@dataclass
class Prediction:
    """What the analytic model says of the worst rank, from the configuration alone."""

    steady: StepPrediction
    first_step: StepPrediction
    states: MemoryBreakdown  # persistent bytes between steps, after the first optimizer step
    num_parameters: int
    assumptions: list[str]
    fits: bool | None = None  # under train.memory_limit_gib and in the GPU; None: neither is known
    managed_bytes: int | None = None  # paged optimizer states: CUDA managed memory, in no category; None: none

    def to_cli_json(self) -> dict[str, Any]:
        """The stable form of `lab predict --json`: steady state at the top level."""
        out: dict[str, Any] = to_json(self.steady)
        out["first_step"] = to_json(self.first_step)
        out["states"] = to_json(self.states)
        out["num_parameters"] = self.num_parameters
        out["assumptions"] = list(self.assumptions)
        if self.managed_bytes is not None:
            out["managed_bytes"] = self.managed_bytes
        if self.fits is not None:
            out["fits"] = self.fits
        return out


@dataclass
class PhaseReading:
    """What one rank's counters said of one phase of one step (the worst micro-step for peaks)."""

    end_allocated_bytes: int = 0
    peak_allocated_bytes: int = 0
    end_active_bytes: int = 0
    peak_active_bytes: int = 0
    end_reserved_bytes: int = 0
    peak_reserved_bytes: int = 0
    num_alloc_retries: int = 0
    num_ooms: int = 0
    seconds: float = 0.0
    device_used_bytes: int | None = None  # NVML, this GPU, less what was in use before the run (device_foreign_bytes)
    host_rss_bytes: int | None = None
    ledger: MemoryBreakdown | None = None  # live tensors at the phase's end, by category
    unattributed_bytes: int | None = None  # end_allocated_bytes minus the ledger's total
    tensors: MemoryBreakdown | None = None  # the ledger's tensors alone, without the rests of their blocks


@dataclass
class StepMeasurement:
    """One optimizer step on one rank."""

    step: int
    seconds: float
    loss: float | None = None
    phases: dict[StepPhase, PhaseReading] = field(default_factory=dict)
    skipped: bool = False  # the loss scaler found an overflow and left the optimizer out

    def peak_bytes(self, reading: str = "peak_allocated_bytes") -> int:
        """Largest value of a PhaseReading field over the step's phases; 0 with measure=off."""
        return max((int(getattr(p, reading) or 0) for p in self.phases.values()), default=0)


@dataclass
class RankMeasurement:
    """Everything one rank measured."""

    rank: int
    local_rank: int
    hostname: str
    device: str  # GPU name or "cpu"
    source: str  # what stood for the allocator: "cuda_caching_allocator" | "cpu_storage_tracker" | "off"
    build: PhaseReading | None = None
    steps: list[StepMeasurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    managed_bytes: int | None = None  # paged optimizer states, in CUDA managed memory; None: none
    # In use on the GPU before the run, beyond the idle card's: in no device_used_bytes. None: was not read
    device_foreign_bytes: int | None = None


@dataclass
class Residual:
    """Predicted minus measured, worst rank, one quantity."""

    level: str  # MemoryLevel
    where: str  # "peak", "first_step.peak", "<phase>.peak", "<phase>.end", "<phase>.end.<category>"
    predicted_bytes: int
    measured_bytes: int
    rank: int
    spread_bytes: int = 0  # largest minus smallest measured over ranks

    @property
    def error_percent(self) -> float | None:
        return 100.0 * (self.predicted_bytes / self.measured_bytes - 1.0) if self.measured_bytes else None


@dataclass
class RunMetrics:
    """Losses are means over ranks; the step time is the median of rank 0's steady steps."""

    first_loss: float | None = None
    last_loss: float | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    model_flops_utilisation: float | None = None  # 0..1, on GPUs whose peak is in the hardware table


@dataclass
class RunRecord:
    """The whole run: `record.json`."""

    run_id: str
    name: str
    status: RunStatus
    started_at: str  # ISO 8601, UTC
    command: list[str]
    config: dict[str, Any]  # RunConfig as JSON
    environment: dict[str, Any]  # versions of torch, CUDA, NCCL, DeepSpeed, ...; GPU; commit
    prediction: Prediction | None = None
    finished_at: str | None = None
    error: str | None = None  # one line, for every status but ok
    oom: dict[str, Any] | None = None  # status oom: rank, phase, step, bytes at that moment, bytes asked for
    ranks: list[RankMeasurement] = field(default_factory=list)
    residuals: list[Residual] = field(default_factory=list)
    metrics: RunMetrics = field(default_factory=RunMetrics)
    notes: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    @property
    def steady_step(self) -> int | None:
        """Index of the step that stands for the steady state, as the function of this name says."""
        return steady_step(self.ranks)

    def worst(self, reading: str, step: int, phase: StepPhase | None = None) -> tuple[int, int, int] | None:
        """(bytes, rank, spread over ranks) of a PhaseReading field at one step, over the phases or in one."""
        values = [
            (
                int(getattr(r.steps[step].phases[phase], reading) or 0) if phase else r.steps[step].peak_bytes(reading),
                r.rank,
            )
            for r in self.ranks
            if step < len(r.steps) and (phase in r.steps[step].phases if phase else r.steps[step].phases)
        ]
        if not values:
            return None
        value, rank = max(values, key=lambda pair: pair[0])
        return value, rank, value - min(v for v, _ in values)


def steady_step(ranks: Sequence[RankMeasurement]) -> int | None:
    """Index of the step that stands for the steady state: the last one that every rank measured and took.

    None when fewer than two steps were measured. DDP's and DeepSpeed's first steps hold old buckets; the steady state
    starts at the third step. A step that the loss scaler skipped is shorter of the optimizer's part; it stands for the
    steady state only where all steps but the first were skipped, the last one then.
    """
    finished = min((len(r.steps) for r in ranks), default=0)
    if finished < 2:
        return None
    skipped = set(skipped_steps(ranks))
    return next((i for i in range(finished - 1, 0, -1) if i not in skipped), finished - 1)


def skipped_steps(ranks: Sequence[RankMeasurement]) -> list[int]:
    """Indices into ``steps`` of those that were skipped on any rank, of the steps that every rank measured."""
    finished = min((len(r.steps) for r in ranks), default=0)
    return [i for i in range(finished) if any(r.steps[i].skipped for r in ranks)]


def to_json(value: Any) -> Any:
    """Dataclasses, enums, breakdowns -> JSON-able containers. None, and a flag as it is by default, are left out."""
    if isinstance(value, MemoryBreakdown):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: to_json(v) for f, v in pairs if v is not None and not (v is False and f.default is False)}
    if isinstance(value, Mapping):
        return {(k.value if isinstance(k, Enum) else k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return value.value if isinstance(value, Enum) else value


def from_json(cls: Any, tree: Any) -> Any:
    """Inverse of ``to_json`` for a type of this module. Unknown keys are ignored (newer writers)."""
    read = _reader(cls)
    return tree if read is None else read(tree)


@functools.cache
def _reader(cls: Any) -> Callable[[Any], Any] | None:
    """JSON -> ``cls``, found once per type: a record has thousands of values. None: JSON has it as it is."""
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if isinstance(cls, types.UnionType):
        read = _reader(next(a for a in args if a is not type(None)))
        return read and (lambda tree: None if tree is None else read(tree))
    if origin is list:
        item = _reader(args[0])
        return list if item is None else lambda tree: [item(v) for v in tree]
    if origin is dict:
        key, value = args[0] if issubclass(args[0], Enum) else _same, _reader(args[1]) or _same
        return lambda tree: {key(k): value(v) for k, v in tree.items()}
    if cls is MemoryBreakdown:
        return MemoryBreakdown.of
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        fields = [(f.name, _reader(hints[f.name]) or _same) for f in dataclasses.fields(cls)]
        return lambda tree: cls(**{name: read(tree[name]) for name, read in fields if name in tree})
    return cls if isinstance(cls, type) and issubclass(cls, Enum) else None


def _same(value: Any) -> Any:
    return value


def write_json_atomic(path: Path, tree: Any) -> None:
    """Write JSON beside ``path``, flush it to disk and rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(tree, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_record(path: Path, record: RunRecord) -> None:
    write_json_atomic(path, to_json(record))


def read_record(path: Path) -> RunRecord:
    """Read one `record.json`. Raises ValueError for a schema this code does not know."""
    return record_from_json(json.loads(path.read_text(encoding="utf-8")), str(path))


def record_from_json(tree: Mapping[str, Any], source: str) -> RunRecord:
    if (version := tree.get("schema_version")) != SCHEMA_VERSION:
        raise ValueError(f"{source}: record schema {version}, this lab reads {SCHEMA_VERSION}")
    return typing.cast(RunRecord, from_json(RunRecord, tree))
