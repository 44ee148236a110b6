"""The replay allocates and frees the same large blocks in the same order as a real run on an H200 (torch 2.11).

Each file holds the blocks above 1 MiB of one allocator trace: a number is an allocation of so many times 512 B, -1 - n
frees the n-th allocation. Frees between two allocations are sorted: their order changes nothing.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lab.analytic.accumulator import Accumulator
from lab.analytic.attention_fused import flash_splits
from lab.analytic.attention_shape import AttentionShape
from lab.analytic.ops import Ops, Parameter
from lab.analytic.optimizers import clip_gradients
from lab.analytic.segments import spelled_out
from lab.analytic.sharding.fsdp import ALL_REDUCE_STREAM
from lab.analytic.sharding.zero3_reduce import REDUCE_STREAM
from lab.analytic.step import Replay
from lab.analytic.tape import ALLOC, FREE, Event, Tape, Tensor, Trace
from lab.config import RunConfig, load, run_config_from_json
from lab.track.bundle import read_records
from lab.units import MIB
from lab.vocab import MemoryCategory
from tests.unit.hf_cases import hf_overrides, write_config

DATA = Path(__file__).parent / "data"


def large_blocks(events: list[Event]) -> list[int]:
    ordinal: dict[int, int] = {}
    out: list[int] = []
    freed: list[int] = []
    for kind, ident, nbytes, *_ in events:
        if kind == ALLOC and nbytes > MIB:
            out += sorted(freed, reverse=True)
            freed = []
            ordinal[ident] = len(ordinal)
            out.append(nbytes // 512)
        elif kind == FREE and ident in ordinal:
            freed.append(-1 - ordinal[ident])
    return out + sorted(freed, reverse=True)


def of_a_trainer(name: str) -> RunConfig:
    """The configuration that the callback read off the run of this name."""
    records = read_records([DATA.parents[2] / "experiments" / "hf_trainer"])
    return next(run_config_from_json(record.config) for _, record in records if record.name == name)


RUNS = sorted(p.name.split(".")[0].removeprefix("large_blocks_") for p in DATA.glob("large_blocks_*.json.gz"))


@pytest.mark.parametrize("name", RUNS)
def test_order_of_a_real_run(name: str) -> None:
    recorded = json.loads(gzip.decompress((DATA / f"large_blocks_{name}.json.gz").read_bytes()))
    replay = Replay(load(recorded["overrides"]) if "overrides" in recorded else of_a_trainer(recorded["record"]))
    replay.build()
    for _ in range(recorded["steps"]):
        replay.step()
    expected = recorded["events"]
    assert len(expected) > 1000
    assert large_blocks(spelled_out(replay.trace.events, replay.trace.segments))[: len(expected)] == expected


def test_the_real_runs_are_there() -> None:
    assert {"checkpointing", "ddp", "math", "eager", "qlora", "qlora_ddp", "trainer_qlora_checkpointing"} <= set(RUNS)
    assert len(RUNS) == 22


def test_flash_splits_keys_where_rows_leave_multiprocessors_idle() -> None:
    """num_splits_heuristic by hand for 132 multiprocessors, 264 slots of which 0.8 are 211.2."""
    wide = AttentionShape(b=1, s=2048, n=6, k=6, d=64)  # 192 row blocks, 8 key blocks
    # 1, 2, 3 parts fill 0.727 of their waves; 4 parts: 768 / 264 = 2.9 of 3 waves, the first within 85 % of the best
    assert flash_splits(wide, 132) == 4
    assert flash_splits(replace(wide, b=2), 132) == 1  # 384 row blocks
    assert flash_splits(wide, 100) == 1  # 192 of 200 slots
    assert flash_splits(replace(wide, s=256), 132) == 1  # one key block


@pytest.mark.parametrize(("dropout", "parts"), [(0.0, 2), (0.1, 0)])
def test_a_flash_forward_takes_its_parts_for_a_moment_but_not_with_dropout(dropout: float, parts: int) -> None:
    base = ["model=25m", "attention=flash", "train.seq_len=2048", "train.micro_batch_size=1", "hardware=h200"]
    replay = Replay(load([*base, "model.num_layers=1", f"model.dropout={dropout}"]))
    replay.build()
    replay.step()
    found = [e for e in replay.trace.events if e[0] == ALLOC and e[4] == "attention splits"]
    assert len(found) == parts  # log-sum-exp and output


def test_clipping_takes_a_partial_norm_per_chunk_of_the_largest_gradient() -> None:
    trace = Trace(alignment=512)
    clip_gradients(Tape(trace), [(65536 * 2 + 1, 4), (10, 4), (65536, 2)])
    partial = [e[2] for e in trace.events if e[0] == ALLOC and e[4] == "gradient norms, partial"]
    assert partial == [512, 512]  # 2 gradients x 3 chunks x 4 B, 1 x 1 x 4 B, each rounded up
    clip_gradients(Tape(on_cpu := Trace(on_gpu=False)), [(65536 * 2 + 1, 4)])
    assert "gradient norms, partial" not in {e[4] for e in on_cpu.events}


def test_a_broadcast_bucket_of_one_tensor_is_a_view() -> None:
    """The embedding fills a bucket of 250 MiB by itself; what follows is copied, the head with its neighbours."""
    replay = Replay(load(["model=1b", "model.vocab_size=128256", "parallel=ddp", "world_size=2", "hardware=h200"]))
    replay.build()
    copies = [e[2] for e in replay.trace.events if e[0] == ALLOC and e[4] == "DDP broadcast"]
    whole = 128256 * 2048 * 4
    assert len(copies) > 1
    assert sum(copies) == 4 * sum(s.numel for s in replay.rule.specs) - whole


def test_the_engine_sums_and_casts_when_recomputed_tensors_are_gone() -> None:
    """validate_outputs runs after the node's function: its locals (recomputed) are freed, its saved tensors are not."""
    for recomputed in (False, True):
        tape = Tape(Trace())
        saved = tape.new(4, 4, "saved")

        def validate(outputs: list[Tensor | None], tape: Tape = tape) -> None:
            outputs[0] = tape.new(1, 4, "summed")

        operand = Tensor(tape.new(1, 4, "operand").storage, 1, 4, Accumulator("operand"))
        node = tape.node([operand], lambda grads: [grads[0]], [saved], validate=validate)
        assert node is not None
        node.unpack = (lambda: None) if recomputed else None
        del saved
        root = Tensor(tape.new(1, 4, "loss").storage, 1, 4, node)
        del node
        tape.backward(root)
        order = [(e[0], e[4]) for e in tape.trace.events if e[4] in ("saved", "summed")]
        freed, summed = order.index((FREE, "saved")), order.index((ALLOC, "summed"))
        assert (freed < summed) is recomputed


def test_zero3s_overflow_check_is_on_the_reductions_stream() -> None:
    base = ["model=25m", "parallel=zero3", "world_size=2", "precision=fp16_mixed", "hardware=h200", "train.seq_len=128"]
    for overlap in (True, False):
        replay = Replay(load([*base, f"parallel.zero.overlap_comm={overlap}"]))
        replay.build()
        replay.step()
        streams = {e[5] for e in replay.trace.events if e[0] == ALLOC and e[4] in ("isinf", "isnan", "overflow")}
        assert streams == {REDUCE_STREAM if overlap else 0}


def test_hsdp_holds_what_was_summed_over_replicas_until_backward_ends() -> None:
    base = ["model=25m", "parallel=hsdp", "world_size=2", "hardware=h200", "train.seq_len=128"]
    for dtype, held in (("param", True), ("fp32", False)):
        replay = Replay(load([*base, f"parallel.fsdp.reduce_dtype={dtype}"]))
        replay.build()
        replay.step()
        shards = [e for e in replay.trace.events if e[0] == ALLOC and e[4] == "FSDP sharded gradient"]
        assert any(e[5] == ALL_REDUCE_STREAM for e in shards) is held
        assert not replay.rule.all_reduced  # type: ignore[attr-defined]
    # without a cast too: a second micro-step's gradients are all there when they have been added to the first's
    replay = Replay(load([*base, "train.gradient_accumulation_steps=2"]))
    replay.build()
    replay.step()
    live, most = 0, 0
    for kind, _, nbytes, _, label, _ in replay.trace.events:
        live += {ALLOC: nbytes, FREE: -nbytes}.get(kind, 0) if label == "FSDP sharded gradient" else 0
        most = max(most, live)
    assert most == 2 * sum(s.numel * 4 for s in replay.rule.trained)


def trainers_events(folder: Path, family: str, *options: str) -> list[Event]:
    """A Trainer's first step with a peft model whose blocks are checkpointed, until its first forward is over."""
    run = hf_overrides(
        write_config(folder, family), "engine=hf_trainer", "checkpointing=full", "adapter=lora", *options
    )
    replay = Replay(load([*run, "engine.input_gradients=true", "hardware=h200"]))
    replay.build()
    replay.step()
    events = replay.trace.events
    return events[: next(i for i, e in enumerate(events) if e[3] == "0/forward/end")]


def test_a_trainers_leaf_is_what_gemmas_embedding_has_scaled(tmp_path: Path) -> None:
    live = {}
    for kind, ident, _, _, label, _ in trainers_events(tmp_path, "gemma"):
        if kind == ALLOC:
            live[ident] = label
        elif kind == FREE:
            live.pop(ident, None)
    kept = [label for label in live.values() if label.startswith("embedding") and label != "embedding scale"]
    assert kept == ["embedding scaled"]


def test_ddp_around_a_peft_model_clones_its_logits(tmp_path: Path) -> None:
    for options, copied in ((["parallel=ddp"], True), (["parallel=ddp", "engine.find_unused_parameters=false"], False)):
        made = {e[4] for e in trainers_events(tmp_path, "llama", *options, "world_size=2") if e[0] == ALLOC}
        assert ("DDP's copy of the logits" in made) is copied
        assert ("DDP used-parameter map" in made) is copied


def test_the_first_bucket_goes_before_the_second_ones_come_or_with_the_first_reduction() -> None:
    sizes = ["model=25m", "train.seq_len=128", "parallel=ddp", "world_size=2", "hardware=h200"]
    peaks = {}
    for release in (True, False):
        replay = Replay(load([*sizes, f"parallel.ddp.release_first_bucket={release}"]))
        replay.build()
        for _ in range(3):
            replay.step()
        live = peak = 0
        for kind, _, nbytes, _, label, _ in replay.trace.events:
            if label == "DDP bucket" and kind in (ALLOC, FREE):
                live += nbytes if kind == ALLOC else -nbytes
                peak = max(peak, live)
        gradients = sum(s.numel * 4 for s in replay.rule.trained)
        peaks[release] = peak / gradients
        assert live / gradients == pytest.approx(1, rel=1e-3)
    assert peaks[True] == pytest.approx(1, rel=1e-3)
    assert peaks[False] == pytest.approx(2, rel=1e-3)


def labels(tape: Tape) -> list[str]:
    return [e[4] for e in tape.trace.events if e[0] == ALLOC]


def test_a_product_makes_its_second_factors_gradient_first() -> None:
    """derivatives.yaml: an operation's gradients are made in the order of its arguments' names, other before self."""
    tape = Tape(Trace())
    ops = Ops(tape)
    x, y = (Tensor(tape.new(n, 4, "operand").storage, 8, 4, Accumulator("operand")) for n in (8, 8))
    node = ops.mul(x, y, "product").node
    assert node is not None
    assert node.backward is not None
    gx, gy = node.backward([tape.new(8, 4, "gradient")])
    assert gx is not None
    assert gy is not None
    assert gy.storage.id < gx.storage.id


def test_a_recomputed_product_takes_the_backward_threads_workspace() -> None:
    """Chunked loss: the first product of backward's thread belongs to the recomputation."""
    replay = Replay(load(["model=25m", "loss=chunked", "train.seq_len=512", "hardware=h200"]))
    replay.build()
    replay.step()
    made = labels(replay.tape)
    workspace = made.index("cuBLAS workspace, backward thread")
    assert "gradient of head.weight" not in made[:workspace]
    assert made[workspace - 1] == "logits"


def test_a_bias_gradients_semaphores_are_a_block_of_their_own() -> None:
    tape = Tape(Trace())
    ops = Ops(tape, num_streaming_multiprocessors=132)
    w = Parameter("w", (2816, 64), tape.new(2816 * 64, 2, "w", MemoryCategory.PARAMETERS), Accumulator("w"))
    b = Parameter("b", (2816,), tape.new(2816, 2, "b", MemoryCategory.PARAMETERS), Accumulator("b"))
    x = tape.new(2048 * 64, 2, "x")
    node = ops.linear(x, w, b, 2048, "y").node
    assert node is not None
    assert node.backward is not None
    assert node.validate is not None
    node.validate(node.backward([tape.new(2048 * 2816, 2, "gradient")]))
    assert [e[2] for e in tape.trace.events if e[0] == ALLOC and e[4] == "column sum"] == [46_137_344, 88]


def test_a_broadcast_bucket_has_one_type_of_packed_weights_too() -> None:
    """Packed weights seen as fp16 beside bf16 ones are of their size, not of their type: a bucket of their own."""
    base = ["model=125m", "parallel=ddp", "world_size=2", "hardware=h200", "precision=bf16_pure", "adapter=lora"]
    base += ["adapter.prepare_kbit=false"]  # what is not packed stays bf16
    copies = {}
    for storage in ("bf16", "fp16"):
        replay = Replay(load([*base, "quantization=nf4", f"quantization.storage_dtype={storage}"]))
        replay.build()
        copies[storage] = [e[2] for e in replay.trace.events if e[0] == ALLOC and e[4] == "DDP broadcast"]
    packed = sum(s.numel // 2 for s in replay.rule.specs if s.quantized)  # bytes of 4 bits each, in whole 512
    together, adapters = copies["bf16"]
    plain, its_packed, its_adapters = copies["fp16"]
    assert (its_packed, plain + packed, its_adapters) == (packed, together, adapters)


@pytest.mark.parametrize(("precision", "copies"), [("bf16_mixed", 1), ("fp16_mixed", 0)])
def test_a_softmax_in_fp32_reads_fp16_scores_itself(precision: str, copies: int) -> None:
    """_softmax has half_to_float for fp16 alone (SoftMax.cpp); either way the weights that it keeps are fp32."""
    replay = Replay(
        load(["model=25m", "model.num_layers=1", "attention=eager", f"precision={precision}", "hardware=h200"])
    )
    replay.build()
    replay.step()
    made = {e[4]: e[2] for e in replay.trace.events if e[0] == ALLOC}
    shape = replay.decoder.shape
    assert ("scores, fp32" in made) == bool(copies)
    assert made["attention weights, fp32"] == 4 * shape.weights_numel
    assert made["softmax backward product"] == 4 * shape.weights_numel
    assert made["attention weights, fp32 gradient"] == (4 if copies else 2) * shape.weights_numel
