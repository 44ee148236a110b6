"""One process trains: precision, checkpointing, accumulation, attention, compile; the loop around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager

from lab.build import build
from lab.config import RunConfig, load
from lab.data import Batches
from lab.loop import Losses, live_tensors, train
from lab.measure import Meter
from lab.model.loss import InPlaceCrossEntropy
from lab.vocab import MemoryCategory

CPU = torch.device("cpu")
SMALL = [
    "hardware=cpu",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.intermediate_size=176",
    "model.vocab_size=300",
    "data.tokenizer_vocab_size=300",
    "train.seq_len=32",
    "train.steps=3",
]


def config(*overrides: str) -> RunConfig:
    """The small run with overrides; a later value of a setting wins."""
    return load(list({o.partition("=")[0]: o for o in (*SMALL, *overrides)}.values()))


def losses_of(*overrides: str) -> list[float]:
    return trained(config(*overrides))[0]


def trained(cfg: RunConfig, period: int | None = None) -> tuple[list[float], dict[MemoryCategory, int]]:
    """Losses, and bytes by category after the last step (gradients dropped). ``period``: the text repeats itself."""
    tokens = torch.randint(0, 300, (20_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    if period is not None:
        tokens = tokens[:period].repeat(20_000 // period)
    engine = build(cfg, CPU)
    batches = Batches(cfg, tokens.to(torch.uint16).numpy(), CPU, rank=0)
    losses = Losses(cfg.train.steps, CPU)
    finished: list[int] = []
    train(cfg, engine, batches, Meter(0, 0, "cpu"), losses, finished.append)
    assert finished == list(range(cfg.train.steps))
    held: dict[MemoryCategory, int] = {}
    for category, tensor in live_tensors(engine, batches, losses):
        held[category] = held.get(category, 0) + tensor.untyped_storage().nbytes()
    engine.close()
    return losses.read(cfg.train.steps), held


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return losses_of("precision=fp32")


def test_loss_falls_from_that_of_a_guess(plain: list[float]) -> None:
    assert plain[0] == pytest.approx(torch.log(torch.tensor(300.0)).item(), abs=0.1)
    repeated, _ = trained(config("precision=fp32", "train.steps=20", "optimizer.lr=0.01"), period=7)
    assert repeated[-1] < 0.5


@pytest.mark.parametrize("kind", ["full", "every_k", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed", "bf16_pure"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointing_changes_no_loss(kind: str, precision: str, dropout: float) -> None:
    common = [f"precision={precision}", f"model.dropout={dropout}", "attention=math"]
    assert losses_of(*common, f"checkpointing={kind}") == losses_of(*common)


@pytest.mark.parametrize("backend", ["auto", "flash", "math", "eager"])
def test_attention_backends_agree(backend: str, plain: list[float]) -> None:
    assert losses_of("precision=fp32", f"attention={backend}") == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed", "bf16_pure"])
def test_chunked_loss_is_the_loss(precision: str) -> None:
    common = [f"precision={precision}", "train.micro_batch_size=2"]
    whole, chunked = losses_of(*common), losses_of(*common, "loss=chunked", "loss.num_chunks=3")
    assert chunked == pytest.approx(whole, rel=1e-6 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize("kind", ["in_place", "no_upcast"])
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed", "bf16_pure"])
def test_the_loss_made_with_less_memory_is_the_loss(precision: str, kind: str) -> None:
    common = [f"precision={precision}", "train.micro_batch_size=2"]
    whole, found = losses_of(*common), losses_of(*common, f"loss={kind}")
    assert found == pytest.approx(whole, rel=1e-6 if precision == "fp32" else 1e-3)


def test_the_gradient_in_place_is_cross_entropys() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(37, 101, requires_grad=True), torch.randint(0, 101, (37,))
    expected = torch.autograd.grad(3 * F.cross_entropy(logits, targets), logits)[0]
    found = torch.autograd.grad(3 * InPlaceCrossEntropy.apply(logits, targets), logits)[0]
    torch.testing.assert_close(found, expected)


def test_accumulation_is_the_larger_batch() -> None:
    larger = losses_of("precision=fp32", "train.micro_batch_size=4")
    accumulated = losses_of("precision=fp32", "train.micro_batch_size=1", "train.gradient_accumulation_steps=4")
    assert accumulated == pytest.approx(larger, rel=1e-5)


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for_loop"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_optimizer_implementations_agree(kind: str, implementation: str) -> None:
    common = ["precision=fp32", f"optimizer={kind}", "train.max_grad_norm=0.5"]
    assert losses_of(*common, f"optimizer.implementation={implementation}") == pytest.approx(
        losses_of(*common, "optimizer.implementation=for_loop"), rel=1e-5
    )


def test_seed_decides_the_weights() -> None:
    assert losses_of("precision=fp32", "seed=1")[0] != losses_of("precision=fp32", "seed=2")[0]


def test_who_holds_what_between_steps() -> None:
    cfg = config("precision=bf16_mixed", "train.micro_batch_size=2")
    _, held = trained(cfg)
    psi = 2 * 300 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64) + 64
    tensors = 2 + 2 * 9 + 1
    assert held == {
        MemoryCategory.PARAMETERS: 4 * psi,
        MemoryCategory.OPTIMIZER_STATES: 8 * psi + 4 * tensors,
        # Rope tables in bf16, and two pairs of int64 batches.
        MemoryCategory.ACTIVATIONS: 2 * 32 * 16 * 2 + 4 * 2 * 32 * 8,
        MemoryCategory.LOGITS_AND_LOSS: 4 * 3,
    }


@pytest.mark.parametrize("kind", ["none", "full", "selective"])
def test_compiled_model_trains_alike(kind: str, plain: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated by the compiler, run by PyTorch's own kernels: no C++ compiler is waited for."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    assert losses_of("precision=fp32", "train.compile=true", f"checkpointing={kind}") == pytest.approx(plain, rel=1e-5)
    assert len(graphs) == 2, "the whole forward is one graph: once making the rope tables, once finding them"
