"""The small parts of the training runtime: precision, checkpointing, optimizer, initial weights, metrics, progress."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch
from torch import nn

from lab.build import build_meta_model
from lab.config import ConfigError, RunConfig, load
from lab.loop import Losses
from lab.metrics import flops_per_token, run_metrics, utilisation
from lab.optim import build_optimizer, learning_rate
from lab.parallel import ENGINES
from lab.parallel.materialise import initial_value, materialise, slots
from lab.parallel.replicated import ReplicatedEngine, steps_with_first_bucket
from lab.parallel.zero import deepspeed_config
from lab.progress import Progress
from lab.record import PhaseReading, RankMeasurement, StepMeasurement
from lab.transforms.attention_probe import check_attention
from lab.transforms.checkpointing import apply_checkpointing, checkpointed_layers
from lab.transforms.precision import parameter_dtype
from lab.vocab import AttentionBackend, StepPhase, Strategy

CPU = torch.device("cpu")


def config(*overrides: str) -> RunConfig:
    return load(["hardware=cpu", *overrides])


@pytest.mark.parametrize(
    ("model", "millions"),
    # 125m: nanoGPT without biases, 50304 rows; 7b: Llama-2 7B.
    [("tiny", 1.328256), ("125m", 124.37376), ("1b", 953.223168), ("7b", 6738.415616)],
)
def test_presets_are_built_on_meta(model: str, millions: float) -> None:
    decoder = build_meta_model(config(f"model={model}"))
    assert all(p.is_meta for p in decoder.parameters())
    assert sum(p.numel() for p in decoder.parameters()) == round(millions * 1e6)


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (["precision=fp32"], torch.float32),
        (["precision=bf16_mixed"], torch.float32),
        (["precision=bf16_pure"], torch.bfloat16),
        (["parallel=zero1", "precision=fp32"], torch.float32),
        (["parallel=zero2", "precision=bf16_mixed"], torch.bfloat16),
        (["parallel=zero3", "precision=bf16_pure"], torch.bfloat16),
        (["parallel=fsdp", "precision=bf16_mixed"], torch.float32),
    ],
)
def test_parameter_dtype(overrides: list[str], dtype: torch.dtype) -> None:
    cfg = config(*overrides)
    assert parameter_dtype(cfg) is dtype
    assert {p.dtype for p in build_meta_model(cfg).parameters()} == {dtype}


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        (["checkpointing=none"], []),
        (["checkpointing=full"], [0, 1, 2, 3]),
        (["checkpointing=selective"], [0, 1, 2, 3]),
        (["checkpointing=every_k", "checkpointing.every_k=3"], [0, 3]),
        (["checkpointing=every_k", "checkpointing.every_k=1"], [0, 1, 2, 3]),
    ],
)
def test_checkpointed_layers(overrides: list[str], layers: list[int]) -> None:
    cfg = config(*overrides)
    assert checkpointed_layers(cfg) == layers
    model = build_meta_model(cfg)
    names = [name for name, _ in model.named_parameters()]
    apply_checkpointing(model.blocks, cfg)
    assert [i for i, block in enumerate(model.blocks) if "forward" in vars(block)] == layers
    assert [name for name, _ in model.named_parameters()] == names


def test_selective_keeps_matmuls_and_computes_the_rest_again() -> None:
    """Counted under a dispatch mode: with ``selective`` no matmul of a block runs again, with ``full`` all do."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.matmuls = self.silus = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.matmuls += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            self.silus += func is torch.ops.aten.silu.default
            return func(*args, **(kwargs or {}))

    def count(kind: str) -> tuple[int, int]:
        cfg = config("precision=fp32", "model.num_layers=1", f"checkpointing={kind}")
        model = build_meta_model(cfg)
        apply_checkpointing(model.blocks, cfg)
        list(materialise(model, 0, 1, CPU))
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        with Count() as counted:
            model(tokens, tokens).backward()
        return counted.matmuls, counted.silus

    (plain, silus), full, selective = count("none"), count("full"), count("selective")
    # Seven projections run again; the last one's result is not needed, so the checkpoint stops before it.
    assert full == (plain + 6, silus + 1)
    assert selective == (plain, silus + 1)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("implementation", "flags"), [("fused", (True, False)), ("foreach", (False, True)), ("for_loop", (False, False))]
)
def test_optimizer_flags(kind: str, implementation: str, flags: tuple[bool, bool]) -> None:
    cfg = config(f"optimizer={kind}", f"optimizer.implementation={implementation}").optimizer
    optimizer = build_optimizer([nn.Parameter(torch.zeros(2))], cfg)
    assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == flags
    assert type(optimizer) is (torch.optim.AdamW if kind == "adamw" else torch.optim.SGD)
    assert optimizer.defaults["weight_decay"] == cfg.weight_decay


def test_warm_up_is_linear_then_constant() -> None:
    cfg = config("train.warmup_steps=4", "train.steps=6", "optimizer.lr=0.8")
    assert [learning_rate(cfg, i) for i in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert learning_rate(config("optimizer.lr=0.8"), 0) == 0.8


def test_initial_weights_follow_the_scheme_and_the_seed() -> None:
    cfg = config("model.tied_head=true", "model.bias=true", "model.norm=layernorm", "precision=bf16_pure")

    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = build_meta_model(cfg)
        list(materialise(model, seed, cfg.model.num_layers, CPU))
        assert model.head.weight is model.embedding.weight, "the tie survives"
        return {name: p.detach() for name, p in model.named_parameters()}

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    assert {t.dtype for t in first.values()} == {torch.bfloat16}
    assert first["blocks.0.attention.q_proj.weight"].float().std().item() == pytest.approx(0.02, rel=0.03)
    residual = 0.02 / math.sqrt(2 * cfg.model.num_layers)
    for name in ("blocks.1.attention.o_proj.weight", "blocks.3.mlp.down_proj.weight"):
        assert first[name].float().std().item() == pytest.approx(residual, rel=0.03)
    assert not torch.equal(first["blocks.0.attention.q_proj.weight"], first["blocks.0.attention.k_proj.weight"])
    assert torch.equal(first["norm.weight"], torch.ones_like(first["norm.weight"]))
    assert not first["norm.bias"].any()
    assert not first["blocks.0.mlp.up_proj.bias"].any()


def test_materialise_in_parts_is_materialise_at_once() -> None:
    cfg = config("precision=fp32")
    whole, parts = build_meta_model(cfg), build_meta_model(cfg)
    list(materialise(whole, 7, 4, CPU))
    for unit in [*parts.blocks, parts]:
        done = list(materialise(parts, 7, 4, CPU, only={id(p) for p in unit.parameters()}))
        assert len(done) == (9 if unit is not parts else 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_unknown_module_has_no_initialisation() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv1d(2, 2, 1))
    with pytest.raises(TypeError, match=r"0\.weight.*Conv1d"):
        initial_value(slots(model)[0], 0, 1, CPU)


def test_every_strategy_has_an_engine() -> None:
    assert set(ENGINES) == set(Strategy)


def test_deepspeed_config_passes_every_option_on() -> None:
    cfg = config("parallel=zero3", "precision=bf16_pure", "train.max_grad_norm=0.5", "parallel.zero.sub_group_size=77")
    ds = deepspeed_config(cfg)
    section = ds["zero_optimization"]
    options = dataclasses.asdict(cfg.parallel.zero)
    assert options.pop("overlap_comm") is None
    assert section == {"stage": 3, **options}, "overlap_comm is left to DeepSpeed"
    assert section["sub_group_size"] == 77
    assert ds["gradient_clipping"] == 0.5
    assert ds["bf16"] == {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    assert deepspeed_config(config("parallel=zero1", "precision=fp32")).keys().isdisjoint({"bf16", "fp16"})
    overlapped = deepspeed_config(config("parallel=zero2", "parallel.zero.overlap_comm=true"))
    assert overlapped["zero_optimization"]["overlap_comm"] is True


def test_refused_attention_backend_is_one_line() -> None:
    cfg = config("precision=fp32")
    check_attention(dataclasses.replace(cfg, attention=dataclasses.replace(cfg.attention)), CPU)
    for backend in (AttentionBackend.CUDNN, AttentionBackend.MEM_EFFICIENT):
        refused = dataclasses.replace(cfg, attention=dataclasses.replace(cfg.attention, backend=backend))
        with pytest.raises(ConfigError, match=f"attention={backend.value}: refused here for torch.float32") as error:
            check_attention(refused, CPU)
        assert "\n" not in str(error.value)
    check_attention(config("attention=flash", "model.num_kv_heads=1"), CPU)


def test_flops_per_token_by_hand() -> None:
    # PaLM 540B's own example (2204.02311, appendix B): 118 layers, 48 heads of 256, 2048 tokens.
    cfg = config("model.num_layers=118", "model.num_heads=48", "model.head_dim=256", "train.seq_len=2048")
    assert flops_per_token(cfg, 540_350_000_000) == 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048


def measured(rank: int, seconds: list[float], losses: list[float | None]) -> RankMeasurement:
    steps = [
        StepMeasurement(i, s, x, {StepPhase.FORWARD: PhaseReading()})
        for i, (s, x) in enumerate(zip(seconds, losses, strict=True))
    ]
    return RankMeasurement(rank, rank, "h", "cpu", "test", steps=steps)


def test_metrics_take_steady_steps_and_all_ranks() -> None:
    cfg = config("parallel=ddp", "world_size=2", "train.seq_len=100", "train.micro_batch_size=3")
    cfg = dataclasses.replace(cfg, hardware=dataclasses.replace(cfg.hardware, dense_bf16_flops=1e12))
    ranks = [measured(0, [9.0, 8.0, 0.5, 0.7, 0.6], [4, 3, 2, 2, 1]), measured(1, [1.0] * 5, [6, 3, 2, 2, 2])]
    metrics = run_metrics(cfg, 1_000_000, ranks, None)
    assert (metrics.first_loss, metrics.last_loss) == (5.0, 1.5)
    assert metrics.step_seconds == 0.6
    assert metrics.tokens_per_second == pytest.approx(600 / 0.6)
    expected = 1000 * (6e6 + 12 * 4 * 128 * 100) / 2e12
    assert metrics.model_flops_utilisation == pytest.approx(expected)
    adapted = dataclasses.replace(cfg, adapter=dataclasses.replace(cfg.adapter, kind="lora"))
    assert utilisation(adapted, 1_000_000, 1.0) is None
    unread = run_metrics(cfg, 1, [measured(0, [1.0], [None])], None)
    assert (unread.first_loss, unread.step_seconds) == (None, 1.0)


def test_losses_average_micro_steps_and_read_what_is_finished() -> None:
    losses = Losses(3, CPU)
    for value in (1.0, 3.0):
        losses.add(0, torch.tensor(value, requires_grad=True), 2)
    losses.add(1, torch.tensor(5.0), 1)
    assert losses.read(2) == [2.0, 5.0] == losses.known
    assert not losses.tensor.requires_grad


def test_progress_prints_the_last_step_on_rank_0_only() -> None:
    cfg = config("train.steps=2")
    for enabled in (True, False):
        stream, losses = io.StringIO(), Losses(2, CPU)
        progress = Progress(cfg, 1, losses, enabled, stream)
        for step in range(2):
            losses.add(step, torch.tensor(3.25), 1)
            progress(step)
        progress.close()
        lines = stream.getvalue().splitlines()
        assert [line.split("  ")[:2] for line in lines] == ([["step 2/2", "loss 3.2500"]] if enabled else [])
        assert losses.known == ([3.25, 3.25] if enabled else [])


def test_ddp_waits_once_for_its_first_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Much longer than NCCL's watchdog sleeps, and after the device is done."""
    done: list[float] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(0.0))
    monkeypatch.setattr("time.sleep", done.append)
    engine = ReplicatedEngine.__new__(ReplicatedEngine)
    engine.device = torch.device("cuda")
    gpu = ["parallel=ddp", "world_size=2", "hardware=h200"]
    ddp = load(gpu)
    engine._first_bucket = steps_with_first_bucket(ddp, engine.device)
    engine.release_first_bucket()
    engine.release_first_bucket()
    assert done[0] == 0.0
    assert len(done) == 2
    assert done[1] >= 1.0
    assert steps_with_first_bucket(ddp, torch.device("cpu")) == 0
    assert steps_with_first_bucket(load(["hardware=h200"]), engine.device) == 0
    assert steps_with_first_bucket(load([*gpu, "parallel.ddp.release_first_bucket=false"]), engine.device) == 0
    static = load([*gpu, "parallel.ddp.static_graph=true"])
    engine._first_bucket = steps_with_first_bucket(static, engine.device)
    engine.release_first_bucket()
    assert len(done) == 2
    engine.release_first_bucket()
    engine.release_first_bucket()
    assert len(done) == 4
