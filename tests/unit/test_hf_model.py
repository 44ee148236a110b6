"""Hugging Face models in the lab's engines: weights read from checkpoints, buffers, checkpointing, bad checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.build import build
from lab.config import ConfigError, RunConfig, load
from lab.model.hf import check_hf_model
from tests.unit.hf_cases import CONFIGS, hf_overrides, write_config

CPU = torch.device("cpu")
TOKENS = torch.arange(64).reshape(2, 32)


def save(folder: Path, family: str, **options: Any) -> Any:
    """A transformers model with weights of its own, saved in ``folder``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tree = dict(CONFIGS[family])
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tree.pop("model_type"), **tree))
    model.save_pretrained(folder, **options)
    return model


def configure(folder: Path, *more: str) -> RunConfig:
    sizes = ["train.seq_len=32", "train.micro_batch_size=2", "data.tokenizer_vocab_size=512", "precision=fp32"]
    return load(["hardware=cpu", "model=hf", f"model.path={folder}", *sizes, *more])


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2_plain", "qwen3"])
def test_loaded_weights_give_transformers_own_loss(family: str, tmp_path: Path) -> None:
    """In one file; the loss is the model's own, labels shifted inside."""
    reference = save(tmp_path, family).train()
    engine = build(configure(tmp_path), CPU)
    expected = reference(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    assert torch.allclose(engine.forward(TOKENS, TOKENS), expected, atol=1e-5)
    engine.close()


def test_sharded_checkpoint_and_bf16_parameters(tmp_path: Path) -> None:
    reference = save(tmp_path, "llama", max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    engine = build(configure(tmp_path, "parallel=single"), CPU)
    for (name, ours), (_, theirs) in zip(engine.model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    engine.close()


def test_checkpoint_without_the_base_models_prefix(tmp_path: Path) -> None:
    """GPT-2's published files say h.0 for transformer.h.0 and hold attention masks, which are not read."""
    from safetensors.torch import load_file, save_file

    save(tmp_path, "gpt2_plain")
    file = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(tensors, file)
    check_hf_model(configure(tmp_path))


def test_pickle_where_it_is_allowed(tmp_path: Path) -> None:
    reference = save(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    engine = build(configure(tmp_path, "model.allow_pickle=true"), CPU)
    assert torch.equal(engine.model.hf.lm_head.weight, reference.lm_head.weight)
    engine.close()
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read"):
        check_hf_model(configure(tmp_path, "model.allow_pickle=true"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "the checkpoint lacks model.norm.weight"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "has model.extra.weight, which LlamaForCausalLM"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"is \[31\] in the checkpoint, \[32\]"),
    ],
)
def test_checkpoints_that_do_not_fit(change: Any, said: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=said):
        check_hf_model(configure(tmp_path))


def test_a_model_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    cfg = load(hf_overrides(write_config(tmp_path, "llama", model_type="mystery"), "hardware=cpu"))
    with pytest.raises(ConfigError, match="transformers refuses its config"):
        check_hf_model(cfg)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_buffers_have_their_values(family: str, tmp_path: Path) -> None:
    """Made on the meta device they have none; they are fp32 whatever the precision."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tree = dict(CONFIGS[family])
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(tree.pop("model_type"), **tree))
    cfg = load(hf_overrides(write_config(tmp_path, family), "hardware=cpu", "precision=fp32"))
    engine = build(cfg, CPU)
    ours, theirs = dict(engine.model.hf.named_buffers()), dict(reference.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert engine.model.hf.get_input_embeddings().weight.std() > 0.01  # not emptied by the buffer's initialiser
    engine.close()


def test_checkpointing_is_transformers_own(tmp_path: Path) -> None:
    path = write_config(tmp_path, "llama")
    flags = {}
    for kind in ("none", "full", "every_k"):
        engine = build(load(hf_overrides(path, "hardware=cpu", f"checkpointing={kind}")), CPU)
        flags[kind] = [layer.gradient_checkpointing for layer in engine.model.blocks]
        engine.close()
    assert flags == {"none": [False, False], "full": [True, True], "every_k": [True, False]}


def test_attention_backends_give_the_same_loss(tmp_path: Path) -> None:
    path = write_config(tmp_path, "llama")
    losses = {}
    for backend in ("auto", "math", "flash", "eager"):
        engine = build(load(hf_overrides(path, "hardware=cpu", "precision=fp32", f"attention={backend}")), CPU)
        losses[backend] = float(engine.forward(TOKENS, TOKENS).detach())
        engine.close()
    assert max(losses.values()) - min(losses.values()) < 1e-5, losses


def test_the_record_of_a_config_replays_without_its_file(tmp_path: Path) -> None:
    from lab.analytic import predict
    from lab.config import run_config_from_json, to_json

    path = write_config(tmp_path, "llama")
    cfg = load(hf_overrides(path, "hardware=h200"))
    tree = json.loads(json.dumps(to_json(cfg)))
    path.unlink()
    assert predict(run_config_from_json(tree)).steady == predict(cfg).steady
