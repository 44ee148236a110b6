"""``lab hardware [DIR ...]``: a hardware row's memory outside PyTorch's allocator, derived from recorded runs.

How a row for another GPU is made: read NVML's device use on the idle card into ``idle_bytes``, run a study there
(h200_matrix, or a few points of it), and give the records to this command.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from lab.cli.arguments import Parser
from lab.config import ConfigError, RunConfig, load, run_config_from_json
from lab.record import RunRecord
from lab.track.bundle import read_records
from lab.vocab import RunStatus, Strategy

HELP = """Driver-level memory of recorded GPU runs: NVML's device use minus what PyTorch's allocator reserved, as the
numbers of configs/hardware/NAME.yaml. Medians over the runs' steady steps.

  lab hardware experiments/h200_matrix
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("hardware", HELP)
    parser.add_records()
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse(argv)
    paths = [Path(p) for p in arguments.paths or ["outputs"]]
    row = hardware_row(record for _, record in read_records(paths))
    if not row:
        raise ConfigError("records", " ".join(map(str, paths)), "no finished GPU run of one process there")
    print(json.dumps(row, indent=1) if arguments.json else "\n".join(f"{k}: {v}" for k, v in row.items()))
    return 0


def hardware_row(records: Iterable[RunRecord]) -> dict[str, int]:
    """The row's fields that these runs determine, in bytes; empty without a single-process run on a GPU."""
    outside: dict[str, list[int]] = {}
    idle = 0
    for record in records:
        if record.status is not RunStatus.OK or record.steady_step is None:
            continue
        cfg = run_config_from_json(record.config)
        if cfg.hardware.device_type != "cuda":
            continue
        idle = idle or load([f"hardware={cfg.hardware.name}"]).hardware.idle_bytes
        for rank in record.ranks:
            for phase in rank.steps[record.steady_step].phases.values():
                if phase.device_used_bytes:
                    outside.setdefault(_kind(cfg), []).append(phase.device_used_bytes - phase.end_reserved_bytes)
    medians = {kind: int(statistics.median_low(values)) for kind, values in outside.items()}
    if "single" not in medians:
        return {}
    row = {"cuda_context_bytes": medians["single"] - idle}
    if "several ranks" in medians:
        row["nccl_bytes"] = medians["several ranks"] - medians["single"]
    if "two communicators" in medians and "several ranks" in medians:
        row["nccl_further_bytes"] = medians["two communicators"] - medians["several ranks"]
    if "one rank" in medians:
        row["nccl_one_rank_bytes"] = medians["one rank"] - medians["single"]
    return row


def _kind(cfg: RunConfig) -> str:
    """Which communicators a run has (lab/analytic/hardware.py)."""
    strategy = cfg.parallel.strategy
    if strategy is Strategy.SINGLE:
        return "single"
    if cfg.world_size == 1:
        return "one rank" if strategy.zero_stage else "one rank, no collectives"
    if strategy is Strategy.HSDP and 1 < cfg.fsdp_shard_size < cfg.world_size:
        return "two communicators"
    return "several ranks"
