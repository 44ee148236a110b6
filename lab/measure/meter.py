"""The interface of a meter, which is also the one for measure=off: it knows where the run is, nothing more."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from lab.record import PhaseReading, RankMeasurement, StepMeasurement
from lab.vocab import MemoryCategory, StepPhase

LiveTensors = Callable[[], Iterable[tuple[MemoryCategory, Tensor]]]
UnseenAllocations = Callable[[], Iterable[tuple[MemoryCategory, int]]]


class Meter:
    """measure=off. ``lab.measure.phases.AllocatorMeter`` does the measuring behind the same methods.

    After an exception inside ``step`` or ``phase``, ``current_step`` and ``current_phase`` still say
    where it came from. ``current_step`` is -1 while building. ``on_step`` is called after each finished
    step, in order; on a GPU when its times are known, which may be a step later.
    """

    def __init__(self, rank: int, local_rank: int, device_name: str, source: str = "off") -> None:
        self.current_phase: StepPhase | None = StepPhase.BUILD
        self.current_step = -1
        self.on_step: Callable[[StepMeasurement], None] | None = None
        self.snapshot_dir: Path | None = None  # where measure=snapshot writes; set by whoever knows the run's folder
        self.skipped_steps: list[int] = []
        self._result = RankMeasurement(rank, local_rank, platform.node(), device_name, source)

    def start(self) -> None:
        """Before the model is built."""

    def set_live_tensors(self, live_tensors: LiveTensors, unseen: UnseenAllocations = tuple) -> None:
        """Who knows which live tensor belongs to which category (engine, data, loop); asked at ledgers.

        ``unseen``: exact byte sizes of allocations that no Python tensor refers to, such as DDP's buckets
        (``bucket_sizes`` or ``rebuilt_bucket_sizes`` of its ``_get_ddp_logging_data()``).
        """

    def claim(self, category: MemoryCategory, tensor: Tensor) -> None:
        """A tensor that ``set_live_tensors`` does not list (the loss, say) is of a category while it lives."""

    def build_done(self) -> None:
        """After the engine is built, before the first step."""
        self.current_phase = None

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """Around one optimizer step."""
        self.current_step = index
        yield

    @contextmanager
    def phase(self, phase: StepPhase) -> Iterator[None]:
        """Around one phase of the step; entered once per micro-step for forward and backward."""
        self.current_phase = phase
        yield
        self.current_phase = None

    def mark_skipped(self) -> None:
        """Inside ``step``, after its phases: the loss scaler left its optimizer step out."""
        self.skipped_steps.append(self.current_step)

    def now(self) -> PhaseReading | None:
        """The counters at this moment, for the record of an OOM; None with measure=off."""
        return None

    @property
    def unfinished_step(self) -> StepMeasurement | None:
        """The phases so far of a step that is running or that an exception ended."""
        return None

    def measurement(self) -> RankMeasurement:
        """Everything measured so far, complete steps only. Callable at any time, also after a fault."""
        return self._result

    def stop(self) -> None:
        """After the last step."""
