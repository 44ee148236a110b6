"""The run folder: ``<launch.output_dir>/<name>/<run id>/`` and everything written into it.

record.json         the whole RunRecord, atomic
prediction.json     the Prediction, written before training starts
rank_<r>.jsonl      one StepMeasurement per line, flushed line by line
oom_rank_<r>.json   what a rank that ran out of memory knew at that moment
.hydra/             config.yaml (resolved) and overrides.yaml
logs/               stdout and stderr per rank, when the sweep driver started the run
wandb/              W&B's own files
"""

from __future__ import annotations

import json
import os
import re
import secrets
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

from lab.config import RunConfig
from lab.config import to_json as config_to_json
from lab.record import (
    Prediction,
    RunRecord,
    StepMeasurement,
    from_json,
    read_record,
    to_json,
    write_json_atomic,
    write_record,
)

TURN_VARIABLE = "LAB_TURN_FILE"  # set by the sweep driver: the file that says that a run's GPUs are free


def new_run_id() -> str:
    """A run id that sorts by time and is unique: UTC time to the microsecond and six random hex digits.

    Environment variable ``LAB_RUN_ID`` (set by the sweep driver) wins. Otherwise one rank calls this
    and sends the result to the others: ranks must never read the clock each for themselves.
    """
    if given := os.environ.get("LAB_RUN_ID"):
        return given
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{secrets.token_hex(3)}"


class RunFolder:
    """Paths, writers and readers of one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._streams: dict[int, TextIOWrapper] = {}

    @classmethod
    def create(cls, cfg: RunConfig, run_id: str, rank: int = 0) -> RunFolder:
        """Make the folder. Every rank may call this (nodes need not share a disk); rank 0 also writes .hydra/."""
        folder = cls(Path(cfg.launch.output_dir) / cfg.name / run_id)
        folder.path.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            folder.write_config(cfg)
        return folder

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def record_path(self) -> Path:
        return self.path / "record.json"

    @property
    def prediction_path(self) -> Path:
        return self.path / "prediction.json"

    @property
    def logs_path(self) -> Path:
        return self.path / "logs"

    @property
    def wandb_path(self) -> Path:
        return self.path / "wandb"

    def rank_path(self, rank: int) -> Path:
        return self.path / f"rank_{rank}.jsonl"

    def write_config(self, cfg: RunConfig) -> None:
        """Hydra's layout: the resolved settings and the overrides as given."""
        from omegaconf import OmegaConf

        tree = config_to_json(cfg)
        overrides = list(tree.pop("overrides"))
        folder = self.path / ".hydra"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(tree)), encoding="utf-8")
        (folder / "overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(overrides)), encoding="utf-8")

    def write_prediction(self, prediction: Prediction) -> None:
        write_json_atomic(self.prediction_path, to_json(prediction))

    def read_prediction(self) -> Prediction | None:
        """The prediction written before training; None if the run did not come that far."""
        if not self.prediction_path.is_file():
            return None
        return cast(Prediction, from_json(Prediction, json.loads(self.prediction_path.read_text(encoding="utf-8"))))

    def append_step(self, rank: int, step: StepMeasurement) -> None:
        """One line, flushed: a killed run keeps every finished step."""
        if rank not in self._streams:
            self._streams[rank] = self.rank_path(rank).open("a", encoding="utf-8")
        stream = self._streams[rank]
        stream.write(json.dumps(to_json(step), separators=(",", ":")) + "\n")
        stream.flush()

    def read_steps(self, rank: int) -> list[StepMeasurement]:
        """The steps a rank finished. A last line cut off by a kill is left out."""
        steps: list[StepMeasurement] = []
        if self.rank_path(rank).is_file():
            for line in self.rank_path(rank).read_text(encoding="utf-8").splitlines():
                try:
                    steps.append(from_json(StepMeasurement, json.loads(line)))
                except (ValueError, TypeError):
                    break
        return steps

    def ranks_on_disk(self) -> list[int]:
        """Ranks that wrote steps here, in order."""
        found = (re.fullmatch(r"rank_(\d+)\.jsonl", p.name) for p in self.path.glob("rank_*.jsonl"))
        return sorted(int(m.group(1)) for m in found if m)

    def read_words(self, kind: str) -> list[dict[str, Any]]:
        """What ranks left in ``<kind>_rank_<r>.json`` (oom, failed, interrupted) as they died, first come first."""
        paths = sorted(self.path.glob(f"{kind}_rank_*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
        return [cast(dict[str, Any], json.loads(p.read_text(encoding="utf-8"))) for p in paths]

    def write_record(self, record: RunRecord) -> None:
        write_record(self.record_path, record)

    def read_record(self) -> RunRecord | None:
        """The record, or None if there is none (yet)."""
        return read_record(self.record_path) if self.record_path.is_file() else None

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
