"""Adafactor and bitsandbytes' optimizers: formulas by hand, and the replay beside the real optimizers on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lab.analytic import predict
from lab.analytic.make_optimizer import make_optimizer
from lab.analytic.managed_memory import BATCH
from lab.analytic.optimizers import Optimizer, Shape
from lab.analytic.reduce import column_partials, norm_workspace_bytes
from lab.analytic.tape import ALLOC, FREE, Tape, Trace
from lab.config import ConfigError, RunConfig, load
from lab.config.limits import BITSANDBYTES_ELEMENTS
from lab.measure.cpu_tracker import StorageTracker
from lab.optim import build_optimizer
from lab.parallel.engine import optimizer_state_tensors
from lab.report.optimizers import optimizer_table
from lab.run_state import RunState
from lab.track import RunFolder
from lab.track.bundle import read_records
from lab.track.select import select
from lab.train import predict_first
from lab.transforms.bnb_optimizers import check_sizes, managed_bytes, paged_notes
from lab.vocab import MemoryCategory
from tests.unit.hf_cases import hf_overrides, write_config

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def made(cfg: RunConfig, gpu: bool) -> Optimizer:
    """A replay whose sizes are not rounded and whose reductions need no scratch memory."""
    hardware = replace(cfg.hardware, num_streaming_multiprocessors=0)
    return make_optimizer(Tape(Trace(1, on_gpu=gpu)), replace(cfg, hardware=hardware))


def bytes_of(optimizer: Optimizer, since: int = 0) -> tuple[int, int]:
    """(peak, end) of what the optimizer allocated, over the events from ``since`` on."""
    sizes: dict[int, int] = {}
    current = peak = 0
    for i, (kind, ident, nbytes, *_) in enumerate(optimizer.tape.trace.events):
        if kind == ALLOC:
            sizes[ident] = nbytes
            current += nbytes
        elif kind == FREE:
            current -= sizes[ident]
        if i >= since:
            peak = max(peak, current)
    return max(peak, current), current


def sized(shapes: list[Shape], itemsize: int = 4) -> list[tuple[int, int]]:
    return [(torch.Size(s).numel(), itemsize) for s in shapes]


# -- by hand --------------------------------------------------------------------------------------


def test_eight_bit_adam_takes_two_bytes_per_element_and_an_absmax_per_block() -> None:
    optimizer = made(load(["optimizer=adamw_8bit"]), gpu=True)
    optimizer.step([(1 << 20, 4)])
    tables = 2 * 256 * 4
    assert bytes_of(optimizer)[1] - tables == int(2.03125 * (1 << 20)) == 2 * (1 << 20) + 2 * 4 * 4096
    before = bytes_of(optimizer)[1]
    optimizer.step([(4095, 4)], group=1)  # below min_8bit_size: two fp32 states, no absmax
    assert bytes_of(optimizer)[1] - before == 8 * 4095
    before = bytes_of(optimizer)[1]
    optimizer.step([(4097, 2)], group=2)  # at 4096 and above: 17 blocks; the parameter's own type does not matter
    assert bytes_of(optimizer)[1] - before == 2 * 4097 + 2 * 4 * 17
    optimizer.step([(1 << 20, 4)])  # the second step makes nothing
    assert bytes_of(optimizer)[1] - before == 2 * 4097 + 2 * 4 * 17


def test_min_8bit_size_is_a_setting() -> None:
    optimizer = made(load(["optimizer=adamw_8bit", "optimizer.min_8bit_size=100"]), gpu=True)
    optimizer.step([(100, 4), (99, 4)])
    assert bytes_of(optimizer)[1] == 2 * 1024 + 2 * (100 + 4) + 8 * 99


def test_a_trainer_keeps_the_states_of_embeddings_in_32_bits(tmp_path: Path) -> None:
    run = hf_overrides(write_config(tmp_path, "gpt2"), "optimizer=adamw_8bit", "hardware=cpu")
    states = [
        predict(load([*run, f"engine={e}"])).states[MemoryCategory.OPTIMIZER_STATES] for e in ("native", "hf_trainer")
    ]
    tokens, positions = 700 * 32, 128 * 32
    assert states[1] - states[0] == sum((8 - 2) * n - 2 * 4 * -(-n // 256) for n in (tokens, positions))


def test_lion_has_one_state_and_one_table() -> None:
    optimizer = made(load(["optimizer=lion_8bit"]), gpu=True)
    optimizer.step([(10_000, 4), (10, 4)])
    assert bytes_of(optimizer)[1] == 1024 + 10_000 + 4 * 40 + 4 * 10


def test_paged_states_leave_the_allocator_from_1e5_elements_on() -> None:
    optimizer = made(load(["optimizer=paged_adamw_8bit"]), gpu=True)
    optimizer.step([(100_000, 4), (99_999, 4)])
    assert optimizer.managed_bytes == 2 * 100_000
    assert optimizer.managed_device_bytes == BATCH  # the driver takes 128 MiB at a time
    assert bytes_of(optimizer)[1] == 2048 + 2 * 4 * 391 + 2 * 99_999 + 2 * 4 * 391
    full = made(load(["optimizer=paged_adamw_32bit"]), gpu=True)
    full.step([(100_000, 2), (99_999, 2)])
    assert (full.managed_bytes, bytes_of(full)[1]) == (800_000, 8 * 99_999)
    cpu = made(load(["optimizer=paged_adamw_32bit"]), gpu=False)
    cpu.step([(100_000, 2), (99_999, 2)])
    assert (cpu.managed_bytes, bytes_of(cpu)[1]) == (0, 8 * 199_999)


@pytest.mark.parametrize(
    ("implementation", "transient"),
    [
        # 20 x 10 at its estimate: its row and column means, the estimate of 40 x 30 still named, its own, one mean
        ("for_loop", 4 * (20 + 10 + 40 * 30 + 20 * 10 + 1)),
        # both estimates, then the vector's beside them until the name `updates` is the vector's
        ("foreach", 4 * (40 * 30 + 20 * 10 + 7)),
    ],
)
def test_adafactor_keeps_rows_and_columns(implementation: str, transient: int) -> None:
    optimizer = made(load(["optimizer=adafactor", f"optimizer.implementation={implementation}"]), gpu=True)
    shapes: list[Shape] = [(40, 30), (20, 10), (7,)]
    optimizer.step(sized(shapes), shapes)
    states = 4 * (40 + 30 + 20 + 10 + 7)
    assert bytes_of(optimizer) == (states + transient, states)
    since = len(optimizer.tape.trace.events)
    optimizer.step(sized(shapes), shapes)
    assert bytes_of(optimizer, since) == (states + transient, states)


def test_adafactor_over_a_flat_partition_factors_nothing() -> None:
    optimizer = made(load(["optimizer=adafactor"]), gpu=True)
    optimizer.step([(5000, 4)])
    assert bytes_of(optimizer) == (3 * 4 * 5000 + 4, 4 * 5000)  # variance; its square and its estimate for a moment


def test_reductions_scratch_memory_as_an_h200_allocates_it() -> None:
    """Adafactor's norms of 125m's embedding, [50304, 768]: the allocator's trace on an H200 (132 multiprocessors)."""
    assert column_partials(50304, 768, 132) == (138_412_032, 4 * 6)
    assert norm_workspace_bytes(50304 * 768, 132, 4) == 2112  # 2560 in the trace, rounded to 512


def test_prediction_tells_paged_states_apart() -> None:
    plain, paged = (
        predict(load(["model=125m", "hardware=h200", f"optimizer={o}"])) for o in ("adamw_8bit", "paged_adamw_8bit")
    )
    assert plain.managed_bytes is None
    managed = paged.managed_bytes or 0
    assert managed > 0.99 * 2 * 124e6
    states = MemoryCategory.OPTIMIZER_STATES
    assert plain.states[states] - paged.states[states] == managed
    assert any(f"{managed} bytes of optimizer states in CUDA managed memory" in a for a in paged.assumptions)
    assert paged.steady.device_used_bytes - paged.steady.reserved_bytes >= managed
    cpu = predict(load(["hardware=cpu", "optimizer=paged_adamw_8bit"]))
    assert cpu.managed_bytes is None
    assert any("does not page" in a for a in cpu.assumptions)


# -- beside the real ones -------------------------------------------------------------------------

SHAPES: list[Shape] = [(300, 400), (64,), (65, 64), (128,), (100, 50), (4096,)]


@pytest.mark.parametrize(
    "options",
    [
        ["optimizer=adamw_8bit"],
        ["optimizer=adamw_8bit", "optimizer.min_8bit_size=6000"],
        ["optimizer=paged_adamw_8bit"],
        ["optimizer=paged_adamw_32bit"],
        ["optimizer=lion_8bit"],
        ["optimizer=adafactor"],
        ["optimizer=adafactor", "optimizer.weight_decay=0.1", "optimizer.implementation=foreach"],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_is_the_real_step(options: list[str], dtype: torch.dtype) -> None:
    """Peak and end of every step to the byte, and every state tensor handed to the ledger."""
    cfg = load(["hardware=cpu", *options])
    params = [nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    tracker = StorageTracker()
    tracker.start()
    first = params[0].detach().clone()
    tracker.register([t for p in params for t in (p.data, p.grad) if t is not None])
    base = tracker.current_bytes
    optimizer = build_optimizer(params, cfg.optimizer)
    replay = made(cfg, gpu=False)
    for step in range(3):
        tracker.reset_peak()
        since = len(replay.tape.trace.events)
        optimizer.step()
        replay.step(sized(SHAPES, dtype.itemsize), SHAPES)
        peak, end = bytes_of(replay, since)
        assert (tracker.peak_bytes - base, tracker.current_bytes - base) == (peak, end), step
    tracker.stop()
    assert not torch.equal(first, params[0])
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in optimizer_state_tensors(optimizer, CPU)
    }
    assert sum(storages.values()) == bytes_of(replay)[1]
    assert len(optimizer.state) == len(params)


def test_the_cpu_says_that_it_does_not_page() -> None:
    cfg = load(["optimizer=paged_adamw_32bit"])
    assert "does not page on a CPU" in paged_notes(cfg.optimizer, CPU)[0]
    assert managed_bytes(cfg.optimizer, CPU) is None
    assert paged_notes(load(["optimizer=adamw_8bit"]).optimizer, CPU) == []


def test_a_partition_that_the_kernels_cannot_count_is_refused() -> None:
    with torch.device("meta"):
        optimizer = torch.optim.SGD([nn.Parameter(torch.empty(BITSANDBYTES_ELEMENTS + 1))])
        small = torch.optim.SGD([nn.Parameter(torch.empty(BITSANDBYTES_ELEMENTS))])
    cfg = load(["optimizer=adamw_8bit"]).optimizer
    with pytest.raises(ConfigError, match="counts a tensor's elements in 32 bits"):
        check_sizes(optimizer, cfg)
    check_sizes(small, cfg)
    check_sizes(optimizer, load(["optimizer=adamw"]).optimizer)


def test_the_prediction_refuses_it_and_the_run_with_it(tmp_path: Path) -> None:
    large = ["model=3b", "parallel=zero1", "optimizer=lion_8bit", "hardware=h200"]
    with pytest.raises(ConfigError, match=r"a rank's flat partition has 2[0-9]{9}"):
        predict(load(large))
    assert predict(load([*large, "world_size=2"])).fits
    state = RunState(load([*large, f"launch.output_dir={tmp_path}"]), [], 0, 0)
    state.folder = RunFolder.create(state.cfg, "too_large", 0)
    with pytest.raises(ConfigError, match="flat partition"):
        predict_first(state)


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["optimizer=adamw_8bit", "parallel=fsdp", "world_size=2"],
            "optimizer=adamw_8bit: bitsandbytes' update has no",
        ),
        (["optimizer=lion_8bit", "parallel=hsdp", "world_size=2"], "no sharding rule for DTensor"),
        (["optimizer=adafactor", "parallel=fsdp_grad_op"], "squares norms in place, which DTensor"),
        (["optimizer=adafactor", "optimizer.implementation=fused"], "torch.optim.Adafactor has none"),
        (["optimizer=lion_8bit", "optimizer.implementation=foreach"], "bitsandbytes' one kernel per tensor"),
        (["optimizer=lion_8bit", "optimizer.eps=1e-6"], "not a setting of optimizer=lion_8bit"),
        (["optimizer=adamw_8bit", "optimizer.min_8bit_size=-1"], "must not be negative"),
        (["optimizer=adam8bit"], "no such option"),
    ],
)
def test_what_is_refused_is_one_line(options: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(options)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_optimizer_table_puts_states_and_the_steps_own_side_by_side() -> None:
    """From the committed records of 125m: 8 bytes per parameter, and foreach's square roots of 4 more."""
    where = ["model=125m", "parallel=single", "checkpointing=none", "precision=bf16_mixed"]
    matrix = ROOT / "experiments" / "h200_matrix" / "records.jsonl"
    records = [r for _, r in select(read_records([matrix]), [*where, "optimizer=adamw"])]
    chosen = {r.config["optimizer"]["implementation"]: r for r in records}
    _, table, note = optimizer_table([chosen["fused"], chosen["foreach"]]).split("\n\n")
    header, _, fused, foreach = table.splitlines()
    assert header.startswith("| optimizer | optimizer.implementation | states B/param | managed B/param |")
    assert fused.startswith("| adamw | fused | 8.000 / 8.0")
    assert "| 0.000 / 0.000 | 0.000 / 0.000 |" in fused
    assert "| 0.46" in foreach.split("0.000 / 0.000", 1)[1]
    assert "GiB = 2^30 bytes" in note
