"""Two gloo processes: the CPU tracker under FSDP2, DDP and ZeRO, the ledger beside it, gather.

One pair of processes goes through all strategies, since starting processes costs more than the runs.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lab.config import RunConfig, load
from lab.measure import StorageTracker, gather, make_meter
from lab.measure.cpu_patches import settling_collectives
from lab.record import to_json
from lab.vocab import MemoryCategory, StepPhase

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
STEPS = 3  # the third is the first that later ones repeat
POINTS = {
    "ddp": ["parallel=ddp", "precision=bf16_mixed", "train.gradient_accumulation_steps=2"],
    "fsdp": ["parallel=fsdp", "precision=bf16_mixed", "checkpointing=full"],
    "fsdp_grad_op": ["parallel=fsdp_grad_op", "precision=fp32"],
    "zero2": ["parallel=zero2", "precision=bf16_mixed"],
    "zero3": ["parallel=zero3", "precision=bf16_pure", "checkpointing=full"],
}


def configure(*overrides: str) -> RunConfig:
    small_buckets = ["parallel.zero.reduce_bucket_size=200000"] if any("zero" in o for o in overrides) else []
    base = ["model=tiny", "train.seq_len=64", f"train.steps={STEPS}", "hardware=cpu", "world_size=2"]
    return load([*base, *small_buckets, *overrides])


def run(cfg: RunConfig, rank: int) -> Any:
    """The configured run's measurements from both ranks, as JSON, on rank 0."""
    from lab.build import build

    meter = make_meter(cfg, CPU, rank, rank)
    meter.start()
    engine = build(cfg, CPU)
    tokens = torch.randint(0, cfg.model.vocab_size, (cfg.train.micro_batch_size, cfg.train.seq_len))

    def live_tensors() -> Iterator[tuple[MemoryCategory, torch.Tensor]]:
        yield from engine.live_tensors()
        yield MemoryCategory.TEMPORARIES, tokens

    meter.set_live_tensors(live_tensors, engine.unseen_allocations)
    meter.build_done()
    for index in range(cfg.train.steps):
        with meter.step(index):
            for micro_step in range(cfg.train.gradient_accumulation_steps):
                with meter.phase(StepPhase.FORWARD):
                    loss = engine.forward(tokens, tokens)
                    meter.claim(MemoryCategory.LOGITS_AND_LOSS, loss)
                with meter.phase(StepPhase.BACKWARD):
                    engine.backward(loss, micro_step == cfg.train.gradient_accumulation_steps - 1)
                del loss
            with meter.phase(StepPhase.OPTIMIZER_STEP):
                engine.optimizer_step()
            with meter.phase(StepPhase.ZERO_GRAD):
                engine.zero_grad()
    meter.stop()
    ranks = gather(meter.measurement(), 2)
    engine.close()
    return None if ranks is None else to_json(ranks)


def sharded_model_peaks(bf16: bool) -> dict[str, list[int]]:
    """FSDP2 training steps seen by our tracker and by FSDPMemTracker: [current, peak] after each of two steps."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from lab.model import Decoder

    cfg = configure("parallel=fsdp", "precision=fp32")
    seen: dict[str, list[int]] = {}
    for who in ("ours", "theirs"):
        torch.manual_seed(0)
        model = Decoder(cfg.model, cfg.attention, cfg.loss)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        for unit in [*model.blocks, model]:
            fully_shard(unit, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        tokens = torch.randint(0, cfg.model.vocab_size, (1, 64))
        ours = StorageTracker()
        theirs = FSDPMemTracker(model, optimizer)
        if who == "ours":
            ours.start()
            ours.register([*model.parameters(), *(b for b in model.buffers()), tokens])
        else:
            theirs.track_inputs((tokens,))
            theirs.__enter__()
            settling = settling_collectives()  # without the pauses neither tracker reads the same peak twice
            settling.__enter__()
        values: list[int] = []
        for _ in range(2):
            loss = model(tokens, tokens)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
            if who == "ours":
                values += [ours.current_bytes, ours.peak_bytes]
            else:
                values += [theirs.get_tracker_snapshot(kind)[CPU]["Total"] for kind in ("current", "peak")]
                theirs.reset_mod_stats()
        if who == "ours":
            ours.stop()
        else:
            settling.__exit__(None, None, None)
            theirs.__exit__(None, None, None)
        seen[who] = values
    return seen


def work(rank: int, folder: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    out: dict[str, Any] = {f"fsdp_bf16={bf16}": sharded_model_peaks(bf16) for bf16 in (False, True)}
    for name, overrides in POINTS.items():
        plain = configure(*overrides)
        for ledger_steps in ((0, -1), ()):
            cfg = replace(plain, measure=replace(plain.measure, ledger_steps=ledger_steps))
            out[f"{name} {list(ledger_steps)}"] = run(cfg, rank)
    if rank == 0:
        (Path(folder) / "out.json").write_text(json.dumps(out))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("measure")
    mp.spawn(work, (str(folder),), nprocs=2)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_same_bytes_as_fsdp_mem_tracker(results: Any, bf16: bool) -> None:
    seen = results[f"fsdp_bf16={bf16}"]
    assert seen["ours"] == seen["theirs"]
    assert seen["ours"][-1] > seen["ours"][-2] > 0


@pytest.mark.parametrize("name", POINTS)
def test_ledger_places_every_byte_and_moves_none(results: Any, name: str) -> None:
    counted, plain = results[f"{name} [0, -1]"], results[f"{name} []"]
    assert [r["rank"] for r in counted] == [0, 1]
    for with_ledger, without in zip(counted, plain, strict=True):
        for step, same in zip(with_ledger["steps"], without["steps"], strict=True):
            for phase, reading in step["phases"].items():
                for key in ("end_allocated_bytes", "peak_allocated_bytes"):
                    assert reading[key] == same["phases"][phase][key], (name, step["step"], phase, key)
                if step["step"] in (0, STEPS - 1):
                    # A few scalars of the engine's own bookkeeping, which on a GPU run are on the host.
                    assert 0 <= reading["unattributed_bytes"] <= 16, (name, step["step"], phase)
                    total = sum(reading["ledger"].values()) + reading["unattributed_bytes"]
                    assert total == reading["end_allocated_bytes"]


def test_states_between_steps_are_the_textbooks(results: Any) -> None:
    """Parameters, master weights and Adam's two states per rank; N = 2, every size divides evenly."""
    whole = configure("parallel=ddp")
    from lab.model import Decoder

    with torch.device("meta"):
        count = sum(p.numel() for p in Decoder(whole.model, whole.attention, whole.loss).parameters())
    expected = {
        "ddp": {"parameters": 4 * count, "comm_buffers": 4 * count, "optimizer_states": 8 * count},
        "fsdp": {"parameters": 2 * count, "optimizer_states": 4 * count},
        "zero2": {"parameters": 2 * count, "master_weights": 2 * count, "optimizer_states": 4 * count},
    }
    for name, states in expected.items():
        ledger = results[f"{name} [0, -1]"][0]["steps"][-1]["phases"]["zero_grad"]["ledger"]
        for category, size in states.items():
            assert 0 <= ledger[category] - size <= 4 * 64, (name, category)  # step counters, 4 B a tensor
