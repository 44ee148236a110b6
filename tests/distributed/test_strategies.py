"""Every strategy over two gloo ranks: the same losses, the bytes that a hand computes, every precision.

One launch of two processes trains all scenarios; the tests read what it wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.strategies_worker import ZERO_BUCKET, scenario_config, train_scenario

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op", "hsdp")
PRECISIONS = ("fp32", "bf16_mixed", "bf16_pure", "fp16_mixed")
# Fused AdamW's step runs on an overflow too: its kernels then write nothing.
SCALED = ("ddp", "zero1", "zero2", "zero3", "fsdp")
CHECKPOINTING = ("full", "every_k", "selective")
# A second model: everything the default one is not.
OTHER_MODEL = [
    "model.norm=layernorm",
    "model.mlp=gelu",
    "model.position=learned",
    "model.bias=true",
    "model.tied_head=true",
    "model.num_kv_heads=2",
    "loss=chunked",
]


def scenarios() -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for strategy in STRATEGIES:
        base = [f"parallel={strategy}"]
        for precision in PRECISIONS:
            fp16 = precision == "fp16_mixed"
            precise = [*base, f"precision={'fp32' if fp16 else precision}"]
            out[f"{strategy} {precision}"] = {"overrides": precise, "fp16": fp16}
        fp32 = [*base, "precision=fp32"]
        out[f"{strategy} other model"] = {"overrides": [*fp32, *OTHER_MODEL]}
        out[f"{strategy} accumulation"] = {"overrides": [*fp32, "train.gradient_accumulation_steps=2"]}
        out[f"{strategy} clipped"] = {"overrides": [*fp32, "train.max_grad_norm=0.1", "train.warmup_steps=3"]}
        out[f"{strategy} sgd"] = {"overrides": [*fp32, "optimizer=sgd"]}
    for strategy in ("ddp", "zero3", "fsdp"):
        for kind in CHECKPOINTING:
            out[f"{strategy} {kind}"] = {
                "overrides": [f"parallel={strategy}", "precision=bf16_mixed", f"checkpointing={kind}"]
            }
    for strategy in SCALED:
        overrides = [f"parallel={strategy}", "precision=fp32", "optimizer.implementation=foreach"]
        out[f"{strategy} overflow"] = {"overrides": overrides, "fp16": True, "overflow_at": 2}
    out["zero3 nothing persists"] = {
        "overrides": ["parallel=zero3", "precision=bf16_mixed", "parallel.zero.stage3_param_persistence_threshold=0"]
    }
    out["ddp bucket view"] = {
        "overrides": ["parallel=ddp", "precision=fp32", "parallel.ddp.gradient_as_bucket_view=true"]
    }
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("strategies")
    (folder / "scenarios.json").write_text(json.dumps(scenarios()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("strategies_worker.py"))]
    command += [str(folder / "scenarios.json"), str(folder / "results.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert (folder / "results.json").is_file(), done.stdout[-2000:] + done.stderr[-6000:]
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="module")
def alone() -> Any:
    """Losses of one process with the same global batch: overrides -> losses per step."""

    def train(*overrides: str, rows: int = 2) -> list[float]:
        cfg = scenario_config(["parallel=single", "precision=fp32", f"train.micro_batch_size={rows}", *overrides])
        return list(train_scenario(cfg, 0)["losses"])

    return train


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestLosses:
    def test_same_curve_as_one_process(self, strategy: str, results: dict[str, Any], alone: Any) -> None:
        curve = results[f"{strategy} fp32"]["losses"]
        assert curve == pytest.approx(alone(), rel=1e-5)
        assert len(set(curve)) == len(curve)

    def test_other_model(self, strategy: str, results: dict[str, Any], alone: Any) -> None:
        assert results[f"{strategy} other model"]["losses"] == pytest.approx(alone(*OTHER_MODEL), rel=1e-5)

    def test_accumulation_is_the_larger_batch(self, strategy: str, results: dict[str, Any], alone: Any) -> None:
        assert results[f"{strategy} accumulation"]["losses"] == pytest.approx(alone(rows=4), rel=1e-5)

    def test_clipping_and_warm_up(self, strategy: str, results: dict[str, Any], alone: Any) -> None:
        settings = ("train.max_grad_norm=0.1", "train.warmup_steps=3", "optimizer=adamw")
        curve = results[f"{strategy} clipped"]["losses"]
        assert curve == pytest.approx(alone(*settings), rel=1e-5)
        assert curve != pytest.approx(alone(), rel=1e-5), "clipping and warm-up change the curve"

    def test_sgd(self, strategy: str, results: dict[str, Any], alone: Any) -> None:
        assert results[f"{strategy} sgd"]["losses"] == pytest.approx(alone("optimizer=sgd"), rel=1e-5)

    @pytest.mark.parametrize("precision", PRECISIONS[1:])
    def test_lower_precisions_stay_close(self, strategy: str, precision: str, results: dict[str, Any]) -> None:
        curve = results[f"{strategy} {precision}"]["losses"]
        assert curve == pytest.approx(results[f"{strategy} fp32"]["losses"], rel=5e-3)
        assert curve != results[f"{strategy} fp32"]["losses"]


@pytest.mark.parametrize("strategy", SCALED)
def test_every_engine_tells_the_step_that_was_skipped(strategy: str, results: dict[str, Any]) -> None:
    """One halving does not bring a scale of 1e30 back, so that the step after is skipped too."""
    overflown, usual = results[f"{strategy} overflow"], results[f"{strategy} fp16_mixed"]
    assert usual["skipped"] == []
    assert overflown["skipped"] == [2, 3]
    assert overflown["losses"][:3] == pytest.approx(usual["losses"][:3], rel=1e-3)


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp"])
def test_checkpointing_changes_no_loss(strategy: str, kind: str, results: dict[str, Any]) -> None:
    assert results[f"{strategy} {kind}"]["losses"] == results[f"{strategy} bf16_mixed"]["losses"]


# The small model by hand: embedding and head 512 x 64, two blocks of 4 x 64 x 64, 3 x 64 x 176 and two norms, a norm.
PSI = 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64) + 64
TENSORS = 2 + 2 * 9 + 1
HALF = PSI // 2  # every tensor divides over two ranks, so no padding


def test_number_of_parameters(results: dict[str, Any]) -> None:
    assert {r["num_parameters"] for name, r in results.items() if "other" not in name} == {PSI}


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        # Fused AdamW: two moments per element and one fp32 step counter per tensor that it is given.
        ("ddp fp32", {"parameters": 4 * PSI, "optimizer_states": 8 * PSI + 4 * TENSORS}),
        ("ddp bf16_mixed", {"parameters": 4 * PSI, "optimizer_states": 8 * PSI + 4 * TENSORS}),
        ("ddp bf16_pure", {"parameters": 2 * PSI, "optimizer_states": 4 * PSI + 4 * TENSORS}),
        ("ddp sgd", {"parameters": 4 * PSI, "optimizer_states": 4 * PSI}),
        ("fsdp bf16_mixed", {"parameters": 4 * HALF, "optimizer_states": 8 * HALF + 4 * TENSORS}),
        ("fsdp bf16_pure", {"parameters": 2 * HALF, "optimizer_states": 4 * HALF + 4 * TENSORS}),
        ("fsdp_grad_op fp32", {"parameters": 4 * HALF, "optimizer_states": 8 * HALF + 4 * TENSORS}),
        ("hsdp fp32", {"parameters": 4 * PSI, "optimizer_states": 8 * PSI + 4 * TENSORS}),  # shards of one rank
        # ZeRO's optimizer sees one flat tensor.
        ("zero1 fp32", {"parameters": 4 * PSI, "master_weights": 4 * HALF, "optimizer_states": 8 * HALF + 4}),
        ("zero1 bf16_mixed", {"parameters": 2 * PSI, "master_weights": 4 * HALF, "optimizer_states": 8 * HALF + 4}),
        ("zero2 fp16_mixed", {"parameters": 2 * PSI, "master_weights": 4 * HALF, "optimizer_states": 8 * HALF + 4}),
        ("zero2 bf16_pure", {"parameters": 2 * PSI, "master_weights": 2 * HALF, "optimizer_states": 4 * HALF + 4}),
        (
            "zero3 nothing persists",
            {
                "parameters": 2 * HALF,
                "master_weights": 4 * HALF,
                "gradients": 2 * HALF,  # kept from step to step
                "optimizer_states": 8 * HALF + 4,
                "comm_buffers": 2 * ZERO_BUCKET,
            },
        ),
        (
            "zero3 bf16_pure",  # every tensor is below param_persistence_threshold: gathered for good
            {
                "parameters": 2 * HALF,
                "master_weights": 2 * HALF,
                "gradients": 2 * HALF,
                "optimizer_states": 4 * HALF + 4,
                "comm_buffers": 2 * ZERO_BUCKET,
                "gathered_parameters": 2 * PSI,
            },
        ),
    ],
)
def test_states_between_steps_to_the_byte(scenario: str, expected: dict[str, int], results: dict[str, Any]) -> None:
    held = results[scenario]["after_step"]
    assert {k: v for k, v in held.items() if k not in ("activations", "temporaries")} == expected
    # Rope tables of 32 positions x 16 in the compute dtype; a loss scale or a gradient norm.
    assert held["activations"] == 2 * 32 * 16 * (4 if scenario.endswith(("fp32", "sgd")) else 2)
    assert held.get("temporaries", 0) <= 16


@pytest.mark.parametrize(
    ("scenario", "gradients"),
    [
        ("ddp fp32", 4 * PSI),
        ("ddp bf16_mixed", 4 * PSI),
        ("ddp bf16_pure", 2 * PSI),
        ("fsdp bf16_mixed", 4 * HALF),
        ("fsdp bf16_pure", 2 * HALF),
        ("hsdp fp32", 4 * PSI),
        ("zero3 bf16_mixed", 2 * HALF),
        ("zero3 fp32", 4 * HALF),
    ],
)
def test_gradients_after_backward_to_the_byte(scenario: str, gradients: int, results: dict[str, Any]) -> None:
    assert results[scenario]["after_backward"]["gradients"] == gradients


@pytest.mark.parametrize(("scenario", "size"), [("zero1 bf16_mixed", 2), ("zero2 bf16_mixed", 2), ("zero2 fp32", 4)])
def test_zero12_keep_their_partition_of_gradients(scenario: str, size: int, results: dict[str, Any]) -> None:
    """Whole gradients of the tensors in this rank's half; one tensor may reach over the border."""
    held = results[scenario]["after_backward"]["gradients"]
    assert size * HALF <= held <= size * (HALF + 512 * 64)


def test_ddp_tells_its_buckets(results: dict[str, Any]) -> None:
    """After the second step one bucket per DDP's size, together every gradient; views of them are gradients."""
    sizes = results["ddp fp32"]["unseen"]
    assert sizes == [4 * PSI, 4 * PSI], "rebuilt and initial: the model is smaller than one bucket"
    assert results["ddp bucket view"]["after_backward"]["gradients"] == 4 * PSI
    assert results["ddp bucket view"]["losses"] == results["ddp fp32"]["losses"]
