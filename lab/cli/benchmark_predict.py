"""``lab benchmark predict``: what a prediction costs, in a warm process and as a command. Milliseconds of wall time."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from lab.analytic import predict
from lab.config import ConfigError, RunConfig, load
from lab.vocab import MemoryLevel

MODELS = ("1b", "7b")
STRATEGIES = (("single", 1), ("ddp", 4), ("zero1", 4), ("zero2", 4), ("zero3", 4), ("fsdp", 4))
LEVELS = ((MemoryLevel.ALLOCATED, "allocated"), (MemoryLevel.DEVICE_USED, "with_allocator"))
REPEATS = 9


def prediction_cost(overrides: Sequence[str]) -> dict[str, float | str]:
    """Per model, strategy and level: median wall time of nine, and the least CPU time; the command: median of three.

    ``overrides`` may name one model, one strategy (with its world_size) or any other setting for all of them.
    """
    given = dict(o.partition("=")[::2] for o in overrides)
    models = (given["model"],) if "model" in given else MODELS
    strategies: tuple[tuple[str, int], ...] = STRATEGIES
    if "parallel" in given:
        strategies = ((given["parallel"], int(given.get("world_size", "1"))),)
    elif "world_size" in given:
        strategies = tuple((name, int(given["world_size"])) for name, size in STRATEGIES if size > 1)
    rest = [o for o in overrides if o.partition("=")[0] not in ("model", "parallel", "world_size")]
    if "hardware" not in given:
        rest.append("hardware=h200")
    figures: dict[str, float | str] = {}
    for model in models:
        for strategy, world in strategies:
            cfg = load([*rest, f"model={model}", f"parallel={strategy}", f"world_size={world}"])
            for level, name in LEVELS:
                key = f"{model}_{strategy}_x{world}_{name}"
                figures[f"{key}_ms"], figures[f"{key}_cpu_ms"] = _in_process(cfg, level)
    strategy, world = strategies[-1]
    command = [*rest, f"model={models[-1]}", f"parallel={strategy}", f"world_size={world}"]
    figures["lab_predict"] = " ".join(command)
    figures["lab_predict_ms"] = _as_command(command)
    return figures


def _in_process(cfg: RunConfig, level: MemoryLevel) -> tuple[float, float]:
    predict(cfg, level)  # warm: imports and caches
    wall, cpu = [], []
    for _ in range(REPEATS):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        predict(cfg, level)
        wall.append(1000 * (time.perf_counter() - begin))
        cpu.append(1000 * (time.process_time() - begin_cpu))
    return statistics.median(wall), min(cpu)


def _as_command(overrides: Sequence[str]) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "lab.cli", "predict", *overrides], stdout=subprocess.DEVNULL, check=False
        )
        times.append(1000 * (time.perf_counter() - begin))
        if done.returncode:
            raise ConfigError("benchmark", "predict", "lab predict did not end well")
    return statistics.median(times)
