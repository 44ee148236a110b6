"""``lab sweep``: every point of a study, one torchrun each, whatever becomes of the single point.

The driver is one process without torch. A point's end is judged by its record, never by torchrun's exit
code; a run that left no record gets one (`lab.track.recover`). Points already recorded are skipped.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lab.analytic import predict
from lab.analytic.hardware import outside_allocator_bytes
from lab.cli.arguments import Parser
from lab.cli.points import Point, identity, invalid_identity, study_points
from lab.cli.process import Launch, clean_environment, threads, torchrun_command
from lab.compare import comparison_row
from lab.config import ConfigError, RunConfig, compose_config, run_config_from_json
from lab.config.device import SHARED_GPU_VARIABLE, visible_gpu_names
from lab.record import RunRecord
from lab.report.table import run_table
from lab.track import RunFolder, environment, fault_of, new_run_id, recover_record
from lab.track.bundle import read_records
from lab.track.folder import TURN_VARIABLE
from lab.units import gib_text
from lab.vocab import RunStatus

HELP = """Runs every point of a study, one torchrun each. Points already recorded are skipped; an out-of-memory
point is a result, and a failed one does not end the sweep. Interrupted points always run again.

  lab sweep experiment=zero_stages
  lab sweep experiment=zero_stages parallel=zero2,zero3 train.seq_len=128,256
  lab sweep parallel=ddp,fsdp world_size=2 name=mine
"""
_POLL_S = 0.05
_FAILED = (RunStatus.FAILED, RunStatus.TIMEOUT)
_RUN_AGAIN = (RunStatus.INTERRUPTED,)  # never finished, through no fault of its own


@dataclass
class _Running:
    point: Point
    cfg: RunConfig
    folder: RunFolder
    launch: Launch
    command: list[str]
    started_at: str
    gpus: list[str]
    turn: Path | None = None  # the file to make when the GPUs are its own; None: they are already


def run(argv: Sequence[str]) -> int:
    parser = Parser("sweep", HELP)
    parser.add_overrides()
    parser.add_argument("--retry-failed", action="store_true", help="run failed and timed-out points again")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="points at a time; on GPUs only as many as have their own"
    )
    parser.add_argument(
        "--ahead",
        action="store_true",
        help="on GPUs: start each point's processes while the one before still runs; they import, then wait",
    )
    parser.add_argument(
        "--share",
        type=int,
        default=1,
        metavar="N",
        help="up to N points on one GPU, as far as their predictions fit it: for memory, not for device use and speed",
    )
    arguments = parser.parse(argv)
    for name in ("jobs", "share"):
        if (count := getattr(arguments, name)) < 1:
            raise ConfigError(f"--{name}", count, "1 or more")
    if arguments.share > 1 and arguments.ahead:
        raise ConfigError("--share", arguments.share, "not with --ahead: a GPU that is shared is not waited for")
    drop_launcher_variables()
    points = study_points(arguments.overrides)
    valid = [p for p in points if p.cfg is not None]
    if not valid:  # one mistake in what all points share, not many invalid points
        raise ConfigError(*reason_parts(points))
    signal.signal(signal.SIGTERM, interrupt)
    return Sweep(points, arguments.jobs, arguments.retry_failed, arguments.ahead, arguments.share).run()


def reason_parts(points: Sequence[Point]) -> tuple[str, str, str]:
    """(setting, value, what would be right) of the first point, which breaks a rule: the parts of its ConfigError."""
    setting, _, rest = (points[0].reason or "").partition("=")
    value, _, expected = rest.partition(": ")
    return setting, value, expected


def drop_launcher_variables() -> None:
    """An outer launcher's WORLD_SIZE is not the points'."""
    for name in set(os.environ) - set(clean_environment()):
        del os.environ[name]


def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Handler of SIGTERM: as Ctrl-C."""
    raise KeyboardInterrupt


class Sweep:
    """The points of one study, their records and the processes running now.

    ``share``: how many runs may be on one GPU at a time, where nothing but PyTorch's own counters matters.
    """

    def __init__(
        self,
        points: Sequence[Point],
        jobs: int = 1,
        retry_failed: bool = False,
        ahead: bool = False,
        share: int = 1,
    ) -> None:
        self.points = points
        self.ahead, self.share = ahead, share
        first = next(p.cfg for p in points if p.cfg is not None)
        self.study = Path(first.launch.output_dir) / first.name
        self.jobs = jobs
        self.recorded = _recorded([self.study])
        again = (*_RUN_AGAIN, *(_FAILED if retry_failed else ()))
        self.done = {i for i, (_, r) in self.recorded.items() if r.status not in again}
        self.running: list[_Running] = []
        self.needs: dict[str, int] = {}  # identity -> predicted bytes of device use, where points share a GPU
        self.finished = 0
        self.ran = 0

    def run(self) -> int:
        """Run what is not done; 0 if no point failed, 1 if one did, 130 after Ctrl-C or SIGTERM."""
        todo = [p for p in self.points if p.identity not in self.done]
        skipped = [self.recorded[p.identity][1] for p in self.points if p.identity in self.done]
        failed = sum(r.status in _FAILED for r in skipped)
        hint = f", {failed} of them failed: --retry-failed runs those again" if failed else ""
        print(f"{len(self.points)} points, {len(skipped)} already recorded{hint}", flush=True)
        self.ran = len(todo)
        try:
            self._run_all(todo)
        except KeyboardInterrupt:
            # A second Ctrl-C must not leave half of the processes behind.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("\ninterrupted: stopping what runs", flush=True)
            for running in list(self.running):
                running.launch.stop()
                self._finish(running, RunStatus.INTERRUPTED, "interrupted by Ctrl-C or SIGTERM")
            self._summary()
            return 130
        return self._summary()

    def _run_all(self, todo: list[Point]) -> None:
        queue, every_gpu = list(todo), _gpu_ids()
        while queue or self.running:
            for running in list(self.running):
                over_time = running.turn is None and running.launch.seconds > running.cfg.launch.timeout_s
                if running.launch.poll(running.folder.record_path):
                    self._finish(running)
                elif over_time:
                    running.launch.stop()
                    limit = f"no end after {running.cfg.launch.timeout_s:g} s (launch.timeout_s)"
                    self._finish(running, RunStatus.TIMEOUT, limit)
            for running in self.running:
                if running.turn is not None and not set(running.gpus) & self._gpus(waiting=False):
                    running.launch.restart_clock()
                    running.turn.touch()
                    running.turn = None
            # In order: a point that must wait for its GPUs is not overtaken.
            while queue and self._may_start():
                point = queue[0]
                if point.cfg is None:
                    self._record_invalid(queue.pop(0))
                    continue
                needed = point.cfg.world_size if (self.jobs > 1 or self.ahead) and _on_gpu(point.cfg) else 0
                # The ones with the fewest users first; one that has a run waiting for it takes no second.
                users = Counter(gpu for r in self.running if r.turn is None for gpu in r.gpus)
                full = self._gpus(waiting=True) if self.ahead else {g for g in users if users[g] >= self.share}
                full |= {g for g in users if not self._fits_beside(point, g)}
                free = sorted((g for g in every_gpu if g not in full), key=lambda g: users[g])
                if self.running and needed > len(free):
                    break
                self._start(queue.pop(0), point.cfg, free[:needed])
            if self.running:
                time.sleep(_POLL_S)

    def _may_start(self) -> bool:
        """Fewer than ``jobs`` runs at a time, and with ``ahead`` as many again that wait for their turn."""
        return len(self.running) < self.jobs * (2 if self.ahead else 1)

    def _fits_beside(self, point: Point, gpu: str) -> bool:
        """Whether the predicted device use of the runs on a GPU leaves room for one more point."""
        others = [r.point for r in self.running if gpu in r.gpus]
        if not others or self.share == 1 or point.cfg is None:
            return True
        for p in (point, *others):
            if p.cfg is not None and p.identity not in self.needs:
                limit = p.cfg.memory_limit_bytes  # a run that ends at it was there, whatever its steady state needs
                asked = limit + outside_allocator_bytes(p.cfg) if limit else 0
                self.needs[p.identity] = asked or predict(p.cfg).steady.device_used_bytes
        return sum(self.needs[p.identity] for p in (point, *others)) <= point.cfg.hardware.capacity_bytes

    def _gpus(self, waiting: bool) -> set[str]:
        """GPUs of the runs that wait for them, or of those that use them."""
        return {gpu for r in self.running if (r.turn is not None) is waiting for gpu in r.gpus}

    def _start(self, point: Point, cfg: RunConfig, gpus: list[str]) -> None:
        folder = RunFolder.create(cfg, new_run_id())
        command = torchrun_command(point.overrides, cfg.world_size, folder.logs_path)
        extra = {"OMP_NUM_THREADS": threads()}
        turn = None
        if gpus:
            extra["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if gpus and self.share > 1:
            extra[SHARED_GPU_VARIABLE] = "1"
        if gpus and self.ahead:
            turn = folder.path / "turn"
            extra[TURN_VARIABLE] = str(turn.absolute())
        if self.jobs == 1 and not self.ahead:
            print(self._head(point), end=" ", flush=True)
        launch = Launch(command, folder.run_id, folder.logs_path, extra)
        self.running.append(_Running(point, cfg, folder, launch, command, _now(), gpus, turn))

    def _finish(self, running: _Running, status: RunStatus | None = None, error: str | None = None) -> None:
        """Take the run's record, or make one. ``status``: why the driver stopped it."""
        self.running.remove(running)
        folder = running.folder
        record = folder.read_record()
        if record is None:
            record = recover_record(folder, running.cfg, running.command, running.started_at, status, error)
            folder.write_record(record)
        elif record.status is RunStatus.INTERRUPTED and status is not RunStatus.INTERRUPTED:
            # Rank 0 only knows that it got SIGTERM: from the driver's time limit, or from torchrun
            # because another rank died.
            found, found_error, oom = (status, error, None) if status else fault_of(folder)
            record.status, record.error, record.oom = found, found_error or error or record.error, oom or record.oom
            folder.write_record(record)
        folder.close()
        self.recorded[running.point.identity] = (str(folder.record_path), record)
        self._print_result(running.point, record, running.launch.seconds)

    def _record_invalid(self, point: Point) -> None:
        run_id = new_run_id()
        folder = RunFolder(self.study / run_id)
        record = RunRecord(
            run_id=run_id,
            name=self.study.name,
            status=RunStatus.INVALID,
            started_at=_now(),
            finished_at=_now(),
            command=["lab", "sweep", *point.overrides],
            config=_invalid_config(point),
            environment=environment(),
            error=point.reason,
        )
        folder.write_record(record)
        self.recorded[point.identity] = (str(folder.record_path), record)
        if self.jobs == 1 and not self.ahead:
            print(self._head(point), end=" ")
        self._print_result(point, record, 0.0)

    def _head(self, point: Point) -> str:
        width = max(len(p.label) for p in self.points)
        return f"[{self.finished + 1:>{len(str(self.ran))}}/{self.ran}] {point.label:<{width}}"

    def _print_result(self, point: Point, record: RunRecord, seconds: float) -> None:
        row = comparison_row(record)
        text = f"{record.status.value:<7} {seconds:6.1f} s"
        if row["measured_allocated_bytes"] is not None and row["predicted_allocated_bytes"] is not None:
            predicted, measured = row["predicted_allocated_bytes"], row["measured_allocated_bytes"]
            text += f"  predicted {gib_text(predicted, 4)} measured {gib_text(measured, 4)} GiB"
        if record.error:
            text += f"  {record.error}"
        print(text if self.jobs == 1 and not self.ahead else f"{self._head(point)} {text}", flush=True)
        self.finished += 1

    def _summary(self) -> int:
        """The table in the study's order, what went wrong, and where the records lie."""
        found = [self.recorded[p.identity] for p in self.points if p.identity in self.recorded]
        records = [record for _, record in found]
        if records:
            print(f"\n{run_table(records)}")
        for path, record in found:
            if record.status is not RunStatus.OK:
                print(f"{record.status.value}: {' '.join(record.config.get('overrides', []))}: {record.error} ({path})")
        print(f"\nrecords: {self.study}{os.sep}<run id>{os.sep}record.json   again: lab compare {self.study}")
        sys.stdout.flush()
        return 1 if any(r.status in _FAILED for r in records) else 0


def _recorded(paths: Sequence[Path]) -> dict[str, tuple[str, RunRecord]]:
    """Identity -> (path, record) of what is recorded already; of several, the last."""
    out: dict[str, tuple[str, RunRecord]] = {}
    for path, record in read_records(p for p in paths if p.is_dir()):
        if record.status is RunStatus.INVALID:
            key = invalid_identity(record.config.get("overrides", []))
        else:
            try:
                key = identity(run_config_from_json(record.config))
            except ConfigError:  # recorded by another version of the schema: not one of today's points
                continue
        out[key] = (path, record)
    return out


def _invalid_config(point: Point) -> dict[str, Any]:
    """What a table shows of a point that breaks a rule: its overrides, and what it would have been if that composes."""
    config: dict[str, Any] = {"overrides": list(point.overrides)}
    try:
        tree = compose_config(point.overrides)
    except ConfigError:
        return config
    config["world_size"] = tree["world_size"]
    for group, setting in (("parallel", "strategy"), ("checkpointing", "kind"), ("precision", "kind")):
        config[group] = {setting: tree[group][setting]}
    return config


def _on_gpu(cfg: RunConfig) -> bool:
    return cfg.hardware.device_type == "cuda"


def _gpu_ids() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may hold for a point: this process's own list, or every index."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    return [str(i) for i in range(len(visible_gpu_names()))]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
