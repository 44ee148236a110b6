"""Weights & Biases: the only module that imports ``wandb``, and only when a run asks for it.

Rank 0 owns the run. Offline is the default: it goes online only with ``tracker=wandb_online`` or after a
login. Every call is guarded: the first failure becomes one note in the record and turns the tracker off;
training goes on. The lab's own JSONL is the truth, W&B a view of it.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlparse

from lab.config import RunConfig
from lab.config import to_json as config_to_json
from lab.record import RunRecord, StepMeasurement
from lab.track.folder import RunFolder
from lab.units import error_percent, to_gib
from lab.vocab import MemoryLevel

Mode = Literal["online", "offline", "disabled"]
INIT_TIMEOUT_S = 30  # online: give up waiting for the server, then fall back to offline
FINISH_TIMEOUT_S = 60  # online: give up waiting for the upload; the files stay for `wandb sync`


class Tracker:
    """Does nothing; the base of W&B's and what ranks other than 0 get."""

    notes: list[str]  # warnings for the record

    def __init__(self) -> None:
        self.notes = []

    def log_step(self, step: StepMeasurement) -> None:
        """One finished step of rank 0. ``loss`` may still be unknown: ``finish`` logs the rest."""

    def finish(self, record: RunRecord) -> None:
        """The whole run, after the record was assembled. Call before the record's last write: ``notes`` may grow."""


def make_tracker(cfg: RunConfig, folder: RunFolder, rank: int) -> Tracker:
    """The tracker for this rank: W&B on rank 0 with ``tracker=wandb*``, else one that does nothing."""
    if rank != 0 or cfg.tracker.kind == "none":
        return Tracker()
    return WandbTracker(cfg, folder)


def wandb_mode(configured: str) -> Mode:
    """W&B's mode for ``tracker.mode``. ``auto``: WANDB_MODE if set, online after a login, else offline. No import."""
    wanted = os.environ.get("WANDB_MODE") if configured == "auto" else configured
    modes: tuple[Mode, ...] = ("online", "offline", "disabled")
    for mode in modes:
        if wanted == mode:
            return mode
    return "online" if _logged_in() else "offline"


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbTracker(Tracker):
    """One W&B run: name = run folder, group = the study's name, files inside the run folder."""

    def __init__(self, cfg: RunConfig, folder: RunFolder) -> None:
        super().__init__()
        self._run: Any = None
        self._loss_logged: set[int] = set()
        mode = wandb_mode(cfg.tracker.mode)
        self._guard("start", lambda: self._start(cfg, folder, mode))
        if self._run is None and mode == "online":
            self._guard("start offline", lambda: self._start(cfg, folder, "offline"))

    def _start(self, cfg: RunConfig, folder: RunFolder, mode: Mode) -> None:
        import wandb

        folder.wandb_path.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=cfg.tracker.project,
            entity=cfg.tracker.entity,
            group=cfg.name,
            name=f"{cfg.parallel.strategy.value}-{folder.run_id}",
            mode=mode,
            dir=str(folder.path),
            config=config_to_json(cfg),
            settings=wandb.Settings(
                x_disable_stats=True,
                console="off",
                silent=True,
                x_save_requirements=False,
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run

    def _guard(self, what: str, call: Callable[[], None]) -> None:
        """Run ``call``; a failure is one note, and nothing more is sent."""
        try:
            call()
        except Exception as error:  # whatever W&B raises must not stop training
            self.notes.append(f"W&B: {what} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            self._run = None

    def log_step(self, step: StepMeasurement) -> None:
        if self._run is not None:
            self._guard("log", lambda: self._run.log(self._step_values(step)))

    def _step_values(self, step: StepMeasurement) -> dict[str, float]:
        values: dict[str, float] = {"step": step.step, "step_seconds": step.seconds}
        if step.loss is not None:
            values["loss"] = step.loss
            self._loss_logged.add(step.step)
        for phase, reading in step.phases.items():
            values[f"memory_gib/allocated_peak/{phase.value}"] = to_gib(reading.peak_allocated_bytes)
            values[f"memory_gib/reserved_peak/{phase.value}"] = to_gib(reading.peak_reserved_bytes)
            if reading.device_used_bytes is not None:
                values[f"memory_gib/device_used/{phase.value}"] = to_gib(reading.device_used_bytes)
        return values

    def finish(self, record: RunRecord) -> None:
        if self._run is not None:
            self._guard("finish", lambda: self._finish(record))
            self._run = None

    def _finish(self, record: RunRecord) -> None:
        for rank in record.ranks:
            for step in rank.steps:
                values: dict[str, float] = {"step": step.step}
                if rank.rank == 0 and step.loss is not None and step.step not in self._loss_logged:
                    values["loss"] = step.loss
                if step.phases:
                    values[f"ranks_gib/allocated_peak/rank_{rank.rank}"] = to_gib(step.peak_bytes())
                    values[f"ranks_gib/reserved_peak/rank_{rank.rank}"] = to_gib(step.peak_bytes("peak_reserved_bytes"))
                if len(values) > 1:
                    self._run.log(values)
        self._run.summary.update(summary(record))
        self._run.finish(exit_code=0 if record.status.value in ("ok", "oom") else 1)


def summary(record: RunRecord) -> dict[str, Any]:
    """What W&B's run table shows: predicted, measured and error per level and category, worst rank; GiB and percent."""
    out: dict[str, Any] = {"status": record.status.value}
    if record.error:
        out["error"] = record.error
    for residual in record.residuals:
        if residual.level == MemoryLevel.ALLOCATED or residual.where in ("peak", "first_step.peak"):
            key = f"{residual.level}/{residual.where}"
            out[f"predicted_gib/{key}"] = to_gib(residual.predicted_bytes)
            out[f"measured_gib/{key}"] = to_gib(residual.measured_bytes)
            if (error := error_percent(residual.predicted_bytes, residual.measured_bytes)) is not None:
                out[f"error_percent/{key}"] = error
            out[f"spread_gib/{key}"] = to_gib(residual.spread_bytes)
    metrics = record.metrics
    for name in ("first_loss", "last_loss", "step_seconds", "tokens_per_second", "model_flops_utilisation"):
        if (value := getattr(metrics, name)) is not None:
            out[name] = value
    return out
