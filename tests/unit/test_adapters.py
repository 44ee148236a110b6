"""Adapters: which parameters they add and freeze, saved and loaded, refused in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lab.analytic.adapters import merge_bytes, targets
from lab.analytic.architecture import parameters
from lab.analytic.inventory import inventory, trainable
from lab.build import build
from lab.cli.main import main
from lab.config import ConfigError, RunConfig, load
from lab.measure.cpu_tracker import StorageTracker
from lab.parallel.saving import save_trained_adapter, trained_module
from lab.transforms.adapters import merge_adapter

TINY = ["model=tiny", "model.num_layers=2", "model.vocab_size=300", "data.tokenizer_vocab_size=300", "hardware=cpu"]
CPU = torch.device("cpu")


def config(*more: str) -> RunConfig:
    return load([*TINY, "precision=fp32", "adapter.dropout=0.0", *more])


def loss_of(engine: object, cfg: RunConfig) -> torch.Tensor:
    tokens = torch.arange(32).reshape(1, 32) % cfg.model.vocab_size
    loss: torch.Tensor = engine.forward(tokens, tokens.roll(1, 1))  # type: ignore[attr-defined]
    return loss


def test_the_inventory_is_peft_s_own() -> None:
    """Names in order, shapes, what is trained: the analytic list against the real model's parameters."""
    for more in (
        ["adapter=lora"],
        ["adapter=dora"],
        ["adapter=lora", "adapter.target_modules=[q_proj,down_proj]", "model.bias=true"],
    ):
        cfg = config(*more)
        engine = build(cfg, CPU)
        real = [
            (n.replace(".base_layer", "").replace(".default", ""), tuple(p.shape), p.requires_grad)
            for n, p in engine.decoder.named_parameters()  # type: ignore[attr-defined]
        ]
        assert [(s.name, s.shape, s.trainable) for s in inventory(cfg)] == real


def test_lora_trains_what_the_paper_counts() -> None:
    """Two matrices per target: r * (in + out); tiny has hidden 128 and inner 352."""
    cfg = config("adapter=lora", "adapter.rank=4", "adapter.target_modules=[q_proj,down_proj]")
    assert sum(s.numel for s in trainable(cfg)) == 2 * 4 * ((128 + 128) + (352 + 128))
    trained = trainable(config("adapter=lora", "adapter.train_embeddings=true"))
    assert trained[0].name == "embedding.weight"


def test_dora_starts_at_the_base_and_trains() -> None:
    plain, dora = load([*TINY, "precision=fp32"]), config("adapter=dora", "optimizer.lr=0.01")
    engine = build(dora, CPU)
    assert loss_of(engine, dora).item() == pytest.approx(loss_of(build(plain, CPU), plain).item(), abs=1e-5)
    before = loss_of(engine, dora)
    engine.backward(before, last_micro_step=True)
    engine.optimizer_step()
    assert loss_of(engine, dora).item() < before.item()


@pytest.mark.parametrize("more", [[], ["quantization=nf4_double"], ["adapter.train_embeddings=true"]])
def test_train_save_reload_same_loss(more: list[str], tmp_path: Path) -> None:
    cfg = config("adapter=lora", "optimizer.lr=0.01", *more)
    engine = build(cfg, CPU)
    before = loss_of(engine, cfg).item()
    for _ in range(3):
        engine.backward(loss_of(engine, cfg), last_micro_step=True)
        engine.optimizer_step()
        engine.zero_grad()
    after = loss_of(engine, cfg).item()
    assert after < before - 0.01
    save_trained_adapter(engine, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    again = build(config("adapter=lora", *more, f"adapter.load={tmp_path / 'adapter'}"), CPU)
    assert loss_of(again, cfg).item() == after
    with pytest.raises(ConfigError, match="rank"):
        build(config("adapter=lora", "adapter.rank=2", f"adapter.load={tmp_path / 'adapter'}"), CPU)


@pytest.mark.parametrize(
    ("kind", "precision", "takes"),
    [
        ("lora", "fp32", 2 * 4 * 352 * 128),
        ("dora", "fp32", 4 * 4 * 352 * 128 + 2 * 4 * 352),
        ("dora", "bf16_pure", (2 + 3 * 4 + 2) * 352 * 128 + 2 * 4 * 352),
    ],
)
def test_merging_gives_the_same_loss_and_takes_what_is_predicted(kind: str, precision: str, takes: int) -> None:
    cfg = load([*TINY, f"precision={precision}", "adapter.dropout=0.0", f"adapter={kind}", "optimizer.lr=0.01"])
    engine = build(cfg, CPU)
    engine.backward(loss_of(engine, cfg), last_micro_step=True)
    engine.optimizer_step()
    before, model = loss_of(engine, cfg).item(), trained_module(engine)
    tracker = StorageTracker()
    tracker.register(p.data for p in model.parameters())
    tracker.reset_peak()
    tracker.start()
    held = tracker.current_bytes
    merged = merge_adapter(model)
    tracker.stop()
    itemsize = next(p.element_size() for n, p in merged.named_parameters() if "down_proj" in n)
    assert tracker.peak_bytes - held == merge_bytes(inventory(cfg), cfg.adapter, itemsize) == takes
    assert not any("lora" in name for name, _ in merged.named_parameters())
    rounding = 1e-4 if precision == "fp32" else 2e-2
    assert loss_of(engine, cfg).item() == pytest.approx(before, abs=rounding)


def test_the_merge_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = build(config("adapter=lora"), CPU)
    save_trained_adapter(engine, tmp_path / "adapter")
    given = [*TINY, "precision=fp32", "adapter=lora", f"adapter.load={tmp_path / 'adapter'}"]
    assert main(["merge", *given, "-o", str(tmp_path / "merged.safetensors")]) == 0
    assert "more for a moment" in capsys.readouterr().out
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged["blocks.0.mlp.down_proj.weight"].shape == (128, 352)
    assert main(["merge", *given, "quantization=nf4", "-o", str(tmp_path / "x")]) == 2
    assert "own type" in capsys.readouterr().err


def write_safetensors(path: Path, claimed: int, written: int) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [claimed // 4], "data_offsets": [0, claimed]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * written)


def test_saved_adapters_that_are_refused(tmp_path: Path) -> None:
    load_it = ["adapter=lora", f"adapter.load={tmp_path}"]
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors"):
        config(*load_it)
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="allow_pickle"):
        config(*load_it)
    assert config(*load_it, "adapter.allow_pickle=true").adapter.allow_pickle
    write_safetensors(tmp_path / "adapter_model.safetensors", claimed=64, written=60)
    with pytest.raises(ConfigError, match="corrupt"):
        config(*load_it)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ConfigError, match="corrupt"):
        config(*load_it)
    write_safetensors(tmp_path / "adapter_model.safetensors", claimed=64, written=64)
    assert config(*load_it).adapter.load == str(tmp_path)


@pytest.mark.parametrize(
    ("file", "given", "words"),
    [
        ("gpt2", "q_proj", "q_proj matches no Linear: c_attn, c_proj, c_fc"),
        ("llama_1b", "[q_proj,c_attn]", "c_attn matches no Linear: q_proj, k_proj, v_proj, o_proj, gate_proj"),
        ("llama_1b", "lm_head", "lm_head matches no Linear"),  # tied: the embedding's weight
        ("llama_7b", "lm_head", None),
        ("gpt2", "attn.c_proj", None),
        ("qwen2_0.5b", "layers.3.self_attn.q_proj", None),
        ("qwen2_0.5b", "layers.77.self_attn.q_proj", "matches no Linear"),
    ],
)
def test_targets_are_names_of_the_familys_own_linears(file: str, given: str, words: str | None) -> None:
    asked = f"adapter.target_modules=[{given.strip('[]')}]"
    hf = ["model=hf", f"model.path=configs/hf/{file}.json", "model.random_weights=true", "hardware=h200"]
    if words is None:
        cfg = load([*hf, "adapter=lora", asked])
        assert any(targets(spec, cfg.adapter) for spec in parameters(cfg.model))
        return
    with pytest.raises(ConfigError, match=words) as caught:
        load([*hf, "adapter=lora", asked])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quantization=nf4"], "adapter=lora"),
        (["adapter=lora", "adapter.target_modules=[qproj]"], "qproj matches no Linear"),
        (["adapter=lora", "adapter.target_modules=[]"], "names of Linears"),
        (["adapter=lora", "adapter.dropout=1.0"], "probability"),
        (["adapter=lora", "quantization=nf4", "parallel=zero3", "world_size=2"], "autograd context"),
        (["adapter=lora", "quantization=int8", "parallel=fsdp", "world_size=2"], "Int8Params"),
        (["adapter=lora", "quantization=nf4", "quantization.block_size=100"], "one of 64"),
        (["adapter=lora", "quantization=nf4", "precision=bf16_mixed", "quantization.compute_dtype=fp32"], "set bf16"),
        (
            ["adapter=lora", "quantization=nf4", "quantization.storage_dtype=fp32", "parallel=zero2", "world_size=2"],
            "set bf16 or uint8",
        ),
        (["adapter=dora", "quantization=nf4"], "row norms"),
        (["adapter=dora", "parallel=fsdp", "world_size=2"], "whole base weights"),
        (["quantization=nf4", "adapter=lora", "quantization.storage_dtype=int4"], "expected one of"),
    ],
)
def test_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load([*TINY, *overrides])
    assert "\n" not in str(caught.value)
