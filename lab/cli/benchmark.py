"""``lab benchmark``: tokens per second, what measuring costs, how long a prediction takes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab.cli.arguments import Parser
from lab.cli.benchmark_predict import prediction_cost
from lab.cli.process import clean_environment, threads, torchrun_command
from lab.config import ConfigError, RunConfig, load
from lab.record import read_record
from lab.track import RunFolder, new_run_id
from lab.vocab import RunStatus

HELP = """speed     tokens/s of training with measure=off, from the third step on; one torchrun
measure   what measure=counters costs per step: blocks of steps with and without it, alternating in one process
predict   milliseconds of one prediction, warm: 1b and 7b, per strategy, the allocated level alone and with the
          allocator's simulation; and of `lab predict` as a command

  lab benchmark speed model=125m train.micro_batch_size=16 train.seq_len=1024 train.steps=60 loss=no_upcast
  lab benchmark speed model=125m train.micro_batch_size=16 train.seq_len=1024 train.steps=60 train.compile=true
  lab benchmark measure model=125m train.micro_batch_size=16 train.seq_len=1024
  lab benchmark predict
"""
KINDS = ("speed", "measure", "predict")


def run(argv: Sequence[str]) -> int:
    parser = Parser("benchmark", HELP)
    parser.add_argument("kind", choices=KINDS)
    parser.add_overrides()
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="measure: pairs of blocks (default 10)")
    arguments = parser.parse(argv)
    for name in set(os.environ) - set(clean_environment()):
        del os.environ[name]
    if arguments.kind == "predict":
        figures = prediction_cost(arguments.overrides)
    elif arguments.kind == "speed":
        figures = _speed(arguments.overrides)
    else:
        if arguments.rounds < 1:
            raise ConfigError("--rounds", arguments.rounds, "1 or more")
        figures = _measure(arguments.overrides, arguments.rounds)
    print(json.dumps(figures, indent=1) if arguments.json else _text(figures))
    return 0


def _text(figures: dict[str, float | str]) -> str:
    width = max(len(k) for k in figures)
    return "\n".join(f"{k:<{width}}  {v if isinstance(v, str) else format(v, '.6g')}" for k, v in figures.items())


def _with_defaults(overrides: Sequence[str], **defaults: str) -> list[str]:
    """Overrides plus the defaults whose setting they do not name."""
    given = {o.partition("=")[0] for o in overrides}
    return [*overrides, *(f"{k.replace('__', '.')}={v}" for k, v in defaults.items() if k not in given)]


def _start(cfg: RunConfig, command: Sequence[str], run_id: str) -> int:
    """Run torchrun in the foreground, its progress on this terminal, its table out of the way."""
    environment = {**clean_environment(), "LAB_RUN_ID": run_id, "OMP_NUM_THREADS": threads()}
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode


def _speed(overrides: Sequence[str]) -> dict[str, float | str]:
    given = _with_defaults(overrides, measure="off", tracker="none", name="benchmark_speed")
    cfg = load(given)
    run_id = new_run_id()
    _start(cfg, torchrun_command(given, cfg.world_size), run_id)
    path = RunFolder(Path(cfg.launch.output_dir) / cfg.name / run_id).record_path
    record = read_record(path) if path.is_file() else None
    if record is None or record.status is not RunStatus.OK:
        raise ConfigError("benchmark", "speed", f"the run did not end well: {record.error if record else 'no record'}")
    metrics = record.metrics
    figures: dict[str, float | str] = {
        "tokens_per_second": metrics.tokens_per_second or 0.0,
        "step_seconds": metrics.step_seconds or 0.0,
        "device": record.ranks[0].device,
    }
    if metrics.model_flops_utilisation is not None:
        figures["model_flops_utilisation"] = metrics.model_flops_utilisation
    figures["record"] = str(path)
    return figures


def _measure(overrides: Sequence[str], rounds: int) -> dict[str, float | str]:
    """The worker (``lab.cli.measure_cost``) times blocks of steps; rank 0 leaves the times in a file."""
    given = _with_defaults(overrides, tracker="none", name="benchmark_measure")
    cfg = load(given)
    folder = RunFolder.create(cfg, new_run_id())
    result = folder.path / "measure_cost.json"
    command = torchrun_command([str(rounds), str(result), *given], cfg.world_size, module="lab.cli.measure_cost")
    _start(cfg, command, folder.run_id)
    if not result.is_file():
        raise ConfigError("benchmark", "measure", "the run did not end well")
    times: dict[str, list[float]] = json.loads(result.read_text(encoding="utf-8"))
    # Pairs of neighbouring blocks: a drift of the clock rate touches both alike.
    ratios = [with_ / without for without, with_ in zip(times["off"], times["counters"], strict=True)]
    return {
        "step_seconds_off": statistics.median(times["off"]),
        "step_seconds_counters": statistics.median(times["counters"]),
        "slowdown_percent": 100.0 * (statistics.median(ratios) - 1.0),
        "slowdown_percent_smallest": 100.0 * (min(ratios) - 1.0),
        "slowdown_percent_largest": 100.0 * (max(ratios) - 1.0),
        "result": str(result),
    }
