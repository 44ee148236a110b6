"""Two ranks that train every scenario of test_strategies.py one after the other; rank 0 writes what came out."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lab.build import build
from lab.config import RunConfig, load
from lab.loop import Losses
from lab.measure.cpu_tracker import local_storages
from lab.parallel import Engine
from lab.vocab import MemoryCategory, Precision

CPU = torch.device("cpu")
SMALL = [
    "hardware=cpu",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.intermediate_size=176",
    "model.vocab_size=512",
    "data.tokenizer_vocab_size=300",
    "train.seq_len=32",
    "train.steps=4",
]
ZERO_BUCKET = 20_000  # elements: several buckets per step


def scenario_config(overrides: list[str], fp16: bool = False) -> RunConfig:
    """``fp16``: past the rule that keeps fp16 off CPUs, where it is slow but works."""
    zero = any(o.startswith("parallel=zero") for o in overrides)
    cfg = load([*SMALL, *([f"parallel.zero.reduce_bucket_size={ZERO_BUCKET}"] if zero else []), *overrides])
    if fp16:
        if zero:  # DeepSpeed asks for a processor with fast fp16; PyTorch has slow kernels for any
            from deepspeed.accelerator import get_accelerator

            get_accelerator().is_fp16_supported = lambda: True
        cfg = dataclasses.replace(cfg, precision=dataclasses.replace(cfg.precision, kind=Precision.FP16_MIXED))
    return cfg


def micro_batch(cfg: RunConfig, step: int, micro_step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of the step's global batch, which is the same however many ranks and micro-steps share it."""
    t = cfg.train
    rows = t.micro_batch_size * t.gradient_accumulation_steps * cfg.world_size
    generator = torch.Generator().manual_seed(step)
    batch = torch.randint(0, cfg.model.vocab_size, (rows, t.seq_len + 1), generator=generator)
    first = (micro_step * cfg.world_size + rank) * t.micro_batch_size
    mine = batch[first : first + t.micro_batch_size]
    return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()


def held_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of the engine's tensors by category, each storage once."""
    seen: set[int] = set()
    held: dict[str, int] = {}
    for category, tensor in engine.live_tensors():
        for storage in local_storages(tensor):
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held[category.value] = held.get(category.value, 0) + storage.nbytes()
    return {c.value: held[c.value] for c in MemoryCategory if c.value in held}


def raise_loss_scale(engine: Any) -> None:
    """So far beyond fp16's largest number that the coming step's gradients overflow."""
    if hasattr(engine, "scaler"):
        engine.scaler.update(1e30)
    else:
        engine.optimizer.loss_scaler.cur_scale = 1e30


def train_scenario(cfg: RunConfig, rank: int, overflow_at: int | None = None) -> dict[str, Any]:
    """Losses per step (this rank's share) and what the engine holds after the last backward and step.

    ``overflow_at``: a step after the first whose gradients overflow.
    """
    engine = build(cfg, CPU)
    losses = Losses(cfg.train.steps, CPU)
    after_backward: dict[str, int] = {}
    skipped: list[int] = []
    for step in range(cfg.train.steps):
        if step == overflow_at:
            raise_loss_scale(engine)
        for micro_step in range(cfg.train.gradient_accumulation_steps):
            last = micro_step + 1 == cfg.train.gradient_accumulation_steps
            loss = engine.forward(*micro_batch(cfg, step, micro_step, rank))
            losses.add(step, loss, cfg.train.gradient_accumulation_steps)
            engine.backward(loss, last)
            del loss
        after_backward = held_bytes(engine)
        engine.optimizer_step()
        skipped += [step] * engine.step_was_skipped
        engine.zero_grad()
    result = {
        "num_parameters": engine.num_parameters,
        "losses": losses.read(cfg.train.steps),
        "after_backward": after_backward,
        "after_step": held_bytes(engine),
        "skipped": skipped,
        "unseen": [size for _, size in engine.unseen_allocations()],
    }
    engine.close()
    return result


def main(scenarios: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {}
    for name, scenario in json.loads(scenarios.read_text()).items():
        overflow_at = scenario.pop("overflow_at", None)
        result = train_scenario(scenario_config(**scenario), rank, overflow_at)
        mean = torch.tensor(result["losses"])
        dist.all_reduce(mean)
        result["losses"] = (mean / world_size).tolist()
        assert all(math.isfinite(x) for x in result["losses"]), name
        results[name] = result
        # DeepSpeed and its engine's close collect garbage, half a second each time over everything imported so far.
        gc.collect()
        gc.freeze()
    if rank == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
