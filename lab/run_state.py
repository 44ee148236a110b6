"""What one rank knows of its run so far, and the record that can be made of it at any moment."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from lab.compare import residuals
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

    def measurement(self, finished_steps: int | None = None, step_seconds: float | None = None) -> RankMeasurement:
        """This rank's measurement with its losses; with measure=off, steps with a loss and the wall's time."""
        assert self.meter is not None
        result = self.meter.measurement()
        losses = self.losses.known if self.losses is not None else []
        if not result.steps and finished_steps:
            result.steps = [StepMeasurement(i, step_seconds or 0.0, None) for i in range(finished_steps)]
        for step in result.steps:
            if step.step < len(losses):
                step.loss = losses[step.step]
        return result

    def known_ranks(self) -> list[RankMeasurement]:
        """After a fault: this rank's measurement, and of the others what they left in the run folder."""
        found: list[RankMeasurement] = []
        if self.meter is not None:
            limited = threading.Thread(target=lambda: found.append(self.measurement()), daemon=True)
            limited.start()
            limited.join(MEASUREMENT_TIMEOUT_S)
        if self.folder is None or not found:
            return found
        for rank in self.folder.ranks_on_disk():
            if rank != self.rank:
                steps = self.folder.read_steps(rank)
                note = "read back from the rank's JSONL: the run ended before it could send its measurement"
                found.append(replace(found[0], rank=rank, local_rank=rank, build=None, steps=steps, notes=[note]))
        return sorted(found, key=lambda r: r.rank)

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
            notes=[*self.notes],
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
