"""``lab hardware``: a row of the hardware table, measured on this machine's GPU or derived from recorded runs.

Three sources: a probe (``lab.measure.gpu_probe``) reads what the idle card shows, the number of multiprocessors and the
workspaces that pass through PyTorch's allocator; the study ``experiment=hardware`` runs one configuration per kind of
communicator; what those runs use beyond the allocator's segments gives context, cuDNN and NCCL.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.cli.arguments import Parser
from lab.cli.hardware_row import Probe, hardware_row, row_name, row_yaml
from lab.cli.points import Point, study_points
from lab.cli.process import clean_environment
from lab.cli.sweep import Sweep, drop_launcher_variables
from lab.config import ConfigError
from lab.config.device import visible_gpu_names
from lab.track.bundle import read_records
from lab.track.select import select

HELP = """A row of configs/hardware for this machine's GPU: `--measure` runs what is needed (some minutes, up to 4 GPUs
where they are there) and prints the whole row. Without it, what recorded runs say of the driver-level memory:
NVML's device use minus what PyTorch's allocator reserved, medians over the runs' steady steps.

  lab hardware --measure -o configs/hardware/NAME.yaml
  lab hardware experiments/h200_matrix
"""
STUDY = "hardware"


def run(argv: Sequence[str]) -> int:
    parser = Parser("hardware", HELP)
    parser.add_records()
    parser.add_argument("--measure", action="store_true", help="measure this machine's GPU, which must be idle")
    parser.add_argument("-o", "--output", metavar="FILE", help="--measure: write the row there, not to the console")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse(argv)
    if arguments.measure:
        if arguments.paths or arguments.where or arguments.json:
            raise ConfigError("hardware", "--measure", "takes no records and prints YAML; drop the other arguments")
        return _measure(arguments.output)
    paths = [Path(p) for p in arguments.paths or ["outputs"]]
    row = hardware_row(record for _, record in select(read_records(paths), arguments.where))
    if not row:
        raise ConfigError("records", " ".join(map(str, paths)), "no finished GPU run of one process there")
    print(json.dumps(row, indent=1) if arguments.json else "\n".join(f"{k}: {v}" for k, v in row.items()))
    return 0


def _measure(output: str | None) -> int:
    """Probe, study, row. Raises ConfigError where there is no idle GPU, or where a run of the study failed."""
    if output and not Path(output).parent.is_dir():
        raise ConfigError("--output", output, "its folder does not exist")
    drop_launcher_variables()
    read_probe()  # a card that no process has used yet shows some MiB less
    probe = read_probe()
    points = runnable(study_points([f"experiment={STUDY}"]), len(visible_gpu_names()))
    sweep = Sweep(points, ahead=True)
    if code := sweep.run():
        if code == 130:
            raise KeyboardInterrupt
        raise ConfigError("--measure", STUDY, "a run failed (above); `lab sweep experiment=hardware --retry-failed`")
    records = [sweep.recorded[p.identity][1] for p in points]
    row = hardware_row(records, probe.idle_bytes)
    text = row_yaml(Path(output).stem if output else row_name(probe.gpu_name), probe, row, records[0].environment)
    if output:
        Path(output).write_text(text, encoding="utf-8")
        print(f"\nwritten: {output}")
    else:
        print(f"\n{text}", end="")
    return 0


def read_probe() -> Probe:
    """The probe in a process of its own, gone (with its CUDA context) before the study starts."""
    if not visible_gpu_names():
        raise ConfigError("hardware", "auto", "this machine shows no GPU; `lab hardware --measure` needs one")
    command = [sys.executable, "-m", "lab.measure.gpu_probe"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)
    if done.returncode != 0:
        raise ConfigError(
            "hardware", "--measure", " ".join(done.stderr.strip().splitlines()[-1:]) or "the probe failed"
        )
    return Probe(**json.loads(done.stdout.strip().splitlines()[-1]))


def runnable(points: Sequence[Point], gpus: int) -> list[Point]:
    """The points for which there are GPUs enough."""
    return [p for p in points if p.cfg is not None and p.cfg.world_size <= gpus]
