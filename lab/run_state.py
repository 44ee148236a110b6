"""What one rank knows of its run so far, and the record that can be made of it at any moment."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from lab.compare import residuals, skip_notes
from lab.config import RunConfig
from lab.config import to_json as config_to_json
from lab.loop import Losses
from lab.measure import Meter
from lab.metrics import run_metrics
from lab.record import Prediction, RankMeasurement, RunRecord, StepMeasurement
from lab.track import RunFolder, Tracker, environment
from lab.vocab import RunStatus

MEASUREMENT_TIMEOUT_S = 5.0  # a stuck device must not keep a record from being written
TRACKER_TIMEOUT_S = 8.0


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class RunState:
    """Filled in as the run goes on; read by the end of the run, whichever it is."""

    cfg: RunConfig
    command: list[str]
    rank: int = 0
    local_rank: int = 0
    started_at: str = field(default_factory=now)
    folder: RunFolder | None = None
    prediction: Prediction | None = None
    meter: Meter | None = None
    tracker: Tracker = field(default_factory=Tracker)
    losses: Losses | None = None
    num_parameters: int = 0
    peers: dict[int, int] = field(default_factory=dict)  # rank -> process id, of the other ranks on this node
    notes: list[str] = field(default_factory=list)

    def step_done(self, step: StepMeasurement) -> None:
        """A finished step, once its times are known: one line on disk, one row for the tracker."""
        if self.folder is not None:
            self.folder.append_step(self.rank, step)
        self.tracker.log_step(step)

    def measurement(self, step_seconds: float | None = None) -> RankMeasurement:
        """This rank's measurement with its losses; measure=off: steps with a loss and the wall's mean time."""
        assert self.meter is not None
        assert self.losses is not None
        result = self.meter.measurement()
        if not result.steps and step_seconds is not None:
            skipped = self.meter.skipped_steps
            steps = range(len(self.losses.known))
            result.steps = [StepMeasurement(i, step_seconds, skipped=i in skipped) for i in steps]
        _fill_losses(result, self.losses.known)
        return result

    def known_ranks(self) -> list[RankMeasurement]:
        """After a fault: this rank's measurement, and of the others what they left in the run folder."""
        own: list[RankMeasurement] = []
        limited = threading.Thread(target=self._measure_into, args=(own,), daemon=True)
        limited.start()
        limited.join(MEASUREMENT_TIMEOUT_S)
        if self.folder is None or self.meter is None:
            return []
        first = own[0] if own else RankMeasurement(self.rank, self.local_rank, "", "", "recovered")
        found = [first] if own else []
        for rank in self.folder.ranks_on_disk():
            if rank != self.rank or not own:
                steps = self.folder.read_steps(rank)
                note = "read back from the rank's JSONL: the run ended before it could send its measurement"
                found.append(replace(first, rank=rank, local_rank=rank, build=None, steps=steps, notes=[note]))
        return sorted(found, key=lambda r: r.rank)

    def _measure_into(self, found: list[RankMeasurement]) -> None:
        """On a thread of its own: both calls may wait for a device that never answers."""
        if self.meter is None:
            return
        found.append(self.meter.measurement())
        if self.losses is not None:
            try:
                _fill_losses(found[0], self.losses.read(len(found[0].steps)))
            except RuntimeError:  # the device itself failed
                _fill_losses(found[0], self.losses.known)

    def record(
        self,
        status: RunStatus,
        ranks: list[RankMeasurement],
        error: str | None = None,
        oom: dict[str, Any] | None = None,
        step_seconds: float | None = None,
    ) -> RunRecord:
        """The whole run as a record. ``ranks`` in rank order; may be empty."""
        assert self.folder is not None
        return RunRecord(
            run_id=self.folder.run_id,
            name=self.cfg.name,
            status=status,
            started_at=self.started_at,
            finished_at=now(),
            command=self.command,
            config=config_to_json(self.cfg),
            environment=environment(),
            prediction=self.prediction,
            error=error,
            oom=oom,
            ranks=ranks,
            residuals=residuals(self.prediction, ranks) if self.prediction else [],
            metrics=run_metrics(self.cfg, self.num_parameters, ranks, step_seconds),
            notes=[*self.notes, *skip_notes(ranks)],
        )

    def finish(self, record: RunRecord, limited: bool = False) -> None:
        """Write the record, then close the tracker; its notes go into the record too.

        ``limited``: after a fault the tracker gets some seconds only.
        """
        assert self.folder is not None
        self.folder.write_record(record)
        if limited:
            thread = threading.Thread(target=self.tracker.finish, args=(record,), daemon=True)
            thread.start()
            thread.join(TRACKER_TIMEOUT_S)
        else:
            self.tracker.finish(record)
        if self.tracker.notes:
            record.notes += self.tracker.notes
            self.folder.write_record(record)
        self.folder.close()


def _fill_losses(measurement: RankMeasurement, losses: list[float]) -> None:
    for step, loss in zip(measurement.steps, losses, strict=False):
        step.loss = loss
