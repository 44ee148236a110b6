"""Blocks that are repeated from a recording: the events are those of a replay that runs every block's code."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lab.analytic import predict
from lab.analytic.decoder import Decoder
from lab.analytic.layer_instructions import Hook, Instruction, Play, Rounds, Workspace
from lab.analytic.layer_rounds import RoundRecorder
from lab.analytic.layers import Known, repeat_layers, replay_steps
from lab.analytic.segments import Pairs, Repeated, Together, spelled_out
from lab.analytic.sharding import RULES
from lab.analytic.sharding.accelerate import ACCELERATE_RULES
from lab.analytic.sharding.hf_trainer import TRAINER_RULES
from lab.analytic.sharding.zero_reduction import only_overflow
from lab.analytic.step import Replay
from lab.analytic.tape import ALLOC, EMPTY_CACHE, FREE, MARK, SEGMENT, Event, Storage, Tensor, Trace
from lab.analytic.timeline import Timeline, phases
from lab.config import RunConfig, load
from lab.vocab import STEP_PHASES, MemoryCategory

SMALL = ["model=tiny", "model.num_layers=5", "train.seq_len=64", "train.micro_batch_size=2", "train.steps=4"]
GPU, CPU = "hardware=h200", "hardware=cpu"
OTHER = ["model.norm=layernorm", "model.mlp=gelu", "model.position=learned", "model.bias=true", "model.tied_head=true"]
BUCKETS = "parallel.zero.reduce_bucket_size=200000"
CASES = [
    [GPU],
    [GPU, "precision=bf16_pure", *OTHER, "model.dropout=0.1"],
    [GPU, "precision=fp16_mixed", "model.fused_qkv=true", "model.num_kv_heads=1", "train.max_grad_norm=1.0"],
    [GPU, "precision=fp32", "attention=math", "loss=chunked", "train.gradient_accumulation_steps=3"],
    [GPU, "checkpointing=full", *OTHER],
    [GPU, "checkpointing=every_k", *OTHER, "attention=eager"],
    [GPU, "checkpointing=selective", "attention=flash"],
    [CPU],
    [CPU, "checkpointing=selective", "train.gradient_accumulation_steps=2", "precision=bf16_pure"],
    [GPU, "parallel=ddp", "world_size=2", "parallel.ddp.bucket_cap_mb=1"],
    [GPU, "parallel=ddp", "world_size=2", "parallel.ddp.gradient_as_bucket_view=true", "checkpointing=full"],
    [GPU, "parallel=zero1", "world_size=3", BUCKETS, "train.gradient_accumulation_steps=2"],
    [GPU, "parallel=zero2", "world_size=3", BUCKETS, "parallel.zero.overlap_comm=true"],
    [CPU, "parallel=zero2", "world_size=2", "parallel.zero.contiguous_gradients=false", BUCKETS],
    [GPU, "parallel=zero3", "world_size=4", BUCKETS],
    [GPU, "parallel=zero3", "world_size=2", BUCKETS, "checkpointing=full", "train.gradient_accumulation_steps=2"],
    [
        *(GPU, "parallel=zero3", "world_size=4", BUCKETS),
        *("checkpointing=every_k", "parallel.zero.stage3_max_live_parameters=0"),
    ],
    [
        *(GPU, "parallel=zero3", "world_size=2", BUCKETS, "parallel.zero.stage3_param_persistence_threshold=0"),
        *("parallel.zero.stage3_prefetch_bucket_size=100000", "parallel.zero.stage3_max_reuse_distance=100000"),
    ],
    [CPU, "parallel=zero3", "world_size=2", BUCKETS, "checkpointing=selective", *OTHER],
    [GPU, "parallel=fsdp", "world_size=4", "train.gradient_accumulation_steps=2"],
    [GPU, "parallel=fsdp_grad_op", "world_size=4", "precision=bf16_pure", "checkpointing=full"],
    [CPU, "parallel=hsdp", "world_size=4", "precision=fp32"],
    [GPU, "adapter=lora"],
    [GPU, "adapter=lora", "quantization=nf4_double", "checkpointing=full"],
    [GPU, "adapter=lora", "quantization=int8", *OTHER],
    [CPU, "adapter=dora", "parallel=ddp", "world_size=2"],
    [GPU, "adapter=dora", "checkpointing=selective"],
    [GPU, "adapter=lora", "parallel=zero3", "world_size=2", BUCKETS, "checkpointing=full"],
    [
        *(GPU, "adapter=lora", "parallel=zero3", "world_size=2", BUCKETS, "checkpointing=full"),
        "parallel.zero.stage3_param_persistence_threshold=0",
    ],
    [GPU, "adapter=lora", "parallel=fsdp", "world_size=2"],
    [GPU, "loss=no_upcast", "optimizer=lion_8bit"],
    [GPU, "engine=accelerate", "parallel=fsdp", "world_size=2"],
    [GPU, "engine=accelerate", "parallel=ddp", "world_size=2"],
    [GPU, "engine=accelerate", "parallel=zero3", "world_size=2", BUCKETS],
    [GPU, "optimizer=adafactor"],
    [GPU, "optimizer=adamw_8bit", "parallel=zero2", "world_size=2", BUCKETS],
    [
        *(GPU, "parallel=fsdp", "world_size=3", "adapter=lora", "quantization=nf4", "quantization.storage_dtype=bf16"),
        *("checkpointing=full", *OTHER, "train.gradient_accumulation_steps=2"),
    ],
    [GPU, "parallel=fsdp", "world_size=1", "train.gradient_accumulation_steps=2", "precision=fp16_mixed"],
    [GPU, "parallel=zero3", "world_size=2", BUCKETS, "parallel.zero.contiguous_gradients=false"],
    [CPU, "parallel=zero3", "world_size=1", "train.gradient_accumulation_steps=2"],
    [GPU, "parallel=zero2", "world_size=2", "parallel.zero.reduce_bucket_size=40000"],
    [GPU, "parallel=zero3", "world_size=2", "parallel.zero.reduce_bucket_size=40000"],
    [GPU, "parallel=zero1", "world_size=2", "parallel.zero.overlap_comm=true", BUCKETS],
]  # fmt: skip


def config(overrides: Sequence[str]) -> RunConfig:
    return load([*SMALL, *overrides])


def name_of(overrides: Sequence[str]) -> str:
    return "-".join(o.rpartition("=")[2] for o in overrides[:4])


def in_full(cfg: RunConfig, rank: int, steps: int) -> Replay:
    """Every block's code run."""
    replay = Replay(cfg, rank)
    replay.build()
    for _ in range(steps):
        replay.step()
    return replay


def numbered(events: Sequence[Event]) -> list[Event]:
    """Storages numbered in the order in which they are made."""
    names: dict[int, int] = {}
    out: list[Event] = []
    for kind, ident, nbytes, category, label, stream in events:
        if kind == ALLOC:
            names[ident] = len(names)
        out.append((kind, names[ident] if kind not in (MARK, EMPTY_CACHE) else -1, nbytes, category, label, stream))
    return out


@pytest.mark.parametrize("overrides", CASES, ids=name_of)
def test_events_are_those_of_a_full_replay(overrides: list[str]) -> None:
    """Kind, bytes, category, label, stream and which storage, event by event."""
    cfg = config(overrides)
    rank = Replay(cfg).rule.ranks()[-1]
    fast = replay_steps(cfg, rank)
    assert any(e[0] == SEGMENT for e in fast.trace.events), "no block was repeated"
    full = in_full(cfg, rank, fast.done)
    assert numbered(spelled_out(fast.trace.events, fast.trace.segments)) == numbered(full.trace.events)


@pytest.mark.parametrize("overrides", CASES, ids=name_of)
def test_segments_are_read_as_their_events_are(overrides: list[str]) -> None:
    """Peaks, ends and their categories; and the step from which tensors repeat is like the steady one."""
    cfg = config(overrides)
    rank = Replay(cfg).rule.ranks()[0]
    fast = replay_steps(cfg, rank)
    events, steady = spelled_out(fast.trace.events, fast.trace.segments), fast.done - 1
    (first, repeating, last), _ = Timeline(fast.trace.events, fast.trace.segments).read(
        [0, fast.rule.repeats_from, steady]
    )
    assert (first, last) == (phases(events, 0), phases(events, steady))
    assert repeating == last
    assert set(last) == set(STEP_PHASES)


@pytest.mark.parametrize("overrides", [CASES[0], CASES[9], CASES[14], CASES[19]], ids=name_of)
def test_allocated_level_is_the_full_replay_without_the_allocator(overrides: list[str]) -> None:
    cfg = config(overrides)
    quick = predict(cfg, "allocated")
    by_phase = phases(in_full(cfg, Replay(cfg).rule.ranks()[0], 3).trace.events, 2)
    assert quick.steady.phases == by_phase
    assert quick.steady.allocated_bytes == max(p.peak.total_bytes for p in by_phase.values())
    assert quick.fits is None
    assert "lower bounds" in quick.assumptions[-1]
    whole = predict(cfg)
    assert quick.states == whole.states
    assert quick.steady.allocated_bytes <= whole.steady.allocated_bytes <= whole.steady.reserved_bytes


def test_on_a_cpu_both_levels_are_one() -> None:
    cfg = config([CPU, "parallel=zero1", "world_size=2"])
    assert predict(cfg, "allocated") == predict(cfg)


def test_a_block_of_its_own_kind_is_recorded_for_itself() -> None:
    """Every second block checkpointed: two kinds, each with a recording."""
    replay = replay_steps(config([GPU, "checkpointing=every_k"]), 0)
    begin = next(i for i, e in enumerate(replay.trace.events) if e[0] == MARK)
    played = [e for e in replay.trace.events[begin:] if e[0] == SEGMENT and e[3]]
    assert {e[3] for e in played} == {f"blocks.{i}" for i in range(5)}
    assert len({replay.trace.segments[e[2]].module for e in played}) == 2


def test_what_makes_a_workspace_is_recorded_and_later_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block's code runs but in a recording; only the first block's forward, and here no backward, takes one."""
    ran: list[Trace] = []
    code = Decoder.block

    def block(self: Decoder, i: int, x: Tensor) -> Tensor:
        ran.append(self.ops.tape.trace)
        return code(self, i, x)

    monkeypatch.setattr(Decoder, "block", block)
    known = Known()
    replay = replay_steps(config([GPU]), 0, known=known)
    assert ran
    assert replay.trace not in ran
    unsettled = [r for r in known.recordings.values() if r is not None and r.workspaces]
    assert unsettled
    for recording in unsettled:
        assert any(isinstance(s, Workspace) for s in recording.forward)
        assert recording.settled is not None
        assert not any(isinstance(s, Workspace) for s in (*recording.settled.forward, *recording.settled.backward))
    events = spelled_out(replay.trace.events, replay.trace.segments)
    made = [e[4] for e in events if e[3] is MemoryCategory.LIBRARY_WORKSPACES]
    assert sorted(made) == sorted(set(made))


class _Unlike(Decoder):
    """A decoder whose blocks save a tensor of the model's: not a block's own affair."""

    def block(self, i: int, x):  # type: ignore[no-untyped-def]
        y = super().block(i, x)
        self.ops.tape.save(y.node, self.rope_tables[0])
        return y


def test_what_cannot_be_recorded_is_replayed() -> None:
    cfg = config([GPU])
    replay = Replay(cfg)
    replay.build()
    replay.decoder.__class__ = _Unlike
    replay.step()
    other = Replay(cfg)
    other.build()
    repeat_layers(other)
    other.decoder.__class__ = _Unlike
    other.step()
    assert not any(e[0] == SEGMENT and e[3] for e in other.trace.events)
    assert numbered(other.trace.events) == numbered(replay.trace.events)


def test_rules_without_module_hooks_leave_modules_inside_blocks_alone() -> None:
    """Recorded blocks call no hooks then."""
    rules = {*RULES.values(), *ACCELERATE_RULES.values(), *TRAINER_RULES.values()}
    assert {rule.__name__ for rule in rules if rule.module_hooks} == {"Zero3"}
    for overrides in (CASES[9], CASES[19], ["engine=accelerate", *CASES[19]]):
        rule = Replay(config(overrides)).rule
        x = rule.tape.new(1, 1, "x")
        for module in ("blocks.0", "blocks.0.mlp_norm", "blocks.0.attention.q_proj"):
            assert rule.enter(module, x) is x
            assert rule.leave(module, x) is x
    assert len(rule.tape.trace.events) == 1


def test_rounds_of_hooks_are_kept_only_where_they_leave_nothing_behind() -> None:
    """A hook's storage is renumbered; one that stays, or that somebody else made, makes the rounds impossible."""
    trace = Trace()
    outside = trace.allocate(1, MemoryCategory.TEMPORARIES, "outside")

    def rounds(*extra: Event) -> Rounds | None:
        recorder = RoundRecorder(trace, "blocks.0", 100, 10, 74, 2)

        def run(_: Sequence[Instruction]) -> None:
            trace.free(trace.allocate(1, MemoryCategory.COMM_BUFFERS, "hook's"))
            trace.events.extend(extra)

        recorder.listen([Hook(".mlp", True, True)], run)
        return recorder.rounds

    kept = rounds()
    assert kept is not None
    assert kept.hooks == [Hook(".mlp", True, True)]
    assert isinstance(kept.steps[0], Play)
    assert [e[:2] for e in kept.steps[0].segment.events] == [(ALLOC, 74), (FREE, 74)]
    assert rounds((FREE, *outside[1:])) is None
    assert rounds((ALLOC, 1000, *outside[2:])) is None
    assert rounds(*[(kind, 1000 + i, *outside[2:]) for i in range(2) for kind in (ALLOC, FREE)]) is None


def test_what_is_repeated_goes_back_from_the_last_to_the_first() -> None:
    """With and without shorthand; labels are those of the module that plays it."""

    def run(trace: Trace) -> list[Event]:
        made = [trace.allocate(n, MemoryCategory.PARAMETERS, f"shard of blocks.0.{n}") for n in (5, 700, 3)]
        trace.free(made.pop(1))
        return made

    def events(shorthand: bool) -> list[Event]:
        trace = Trace(512)
        trace.shorthand = shorthand
        trace.allocate(1, MemoryCategory.TEMPORARIES, "before")
        repeated = Repeated(trace, run, "blocks.0")
        for played in [repeated.play(trace, f"blocks.{block}") for block in (0, 12)]:
            played.give_back(trace)
        assert (SEGMENT in {e[0] for e in trace.events}) is shorthand
        return spelled_out(trace.events, trace.segments)

    assert events(True) == events(False)
    freed = [(ident, nbytes, label) for kind, ident, nbytes, _, label, _ in events(True) if kind == FREE]
    assert freed == [
        *[(2, 1024, "shard of blocks.0.700"), (5, 1024, "shard of blocks.12.700")],
        *[(3, 512, "shard of blocks.0.3"), (1, 512, "shard of blocks.0.5")],
        *[(6, 512, "shard of blocks.12.3"), (4, 512, "shard of blocks.12.5")],
    ]


@pytest.mark.parametrize(
    ("filled", "numels", "found"),
    [
        (0, [3, 3, 3], None),  # all fit
        (4, [3, 3, 3], 2),
        (10, [3, 3, 3], 0),  # a full bucket is emptied before the first
        (8, [3, 9, 3], None),  # emptied twice
        (4, [3, 11, 3], None),  # the second never fits
    ],
)
def test_the_gradient_that_empties_the_bucket_is_found_where_there_is_one(
    filled: int, numels: list[int], found: int | None
) -> None:
    assert only_overflow(filled, numels, 10) == found


def test_storages_resized_together_are_those_resized_one_by_one() -> None:
    def events(shorthand: bool) -> list[Event]:
        trace = Trace(512)
        trace.shorthand = shorthand
        kinds: Pairs = {}
        for block in range(2):
            storages = [Storage(trace, n, MemoryCategory.PARAMETERS, f"gathered blocks.{block}.{n}") for n in (5, 700)]
            for storage in storages:
                storage.resize(False)
            together = Together(storages, f"blocks.{block}", kinds)
            together.resize(True)
            together.resize(False)
        assert len(kinds) == 1
        return spelled_out(trace.events, trace.segments)

    assert events(True) == events(False)
    assert sum(e[0] == ALLOC for e in events(True)) == 8
