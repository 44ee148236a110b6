"""Draws the points of configs/experiment/h200_blind7.yaml: ``python experiments/h200_blind7/draw.py``.

As experiments/h200_blind3/draw.py draws them, on one GPU, with *shapes* drawn too: earlier draws took the named models
and changed a few of their sizes. Here hidden and intermediate size, heads, head dimension, layers, vocabulary, sequence
and batch are any number, the odd ones included, and so is the number of steps; Hugging Face models come from
config.json files that are drawn as well (written beside this file, in models/), with the switches that the committed
ones leave alone: attention and MLP biases, tied or not, sliding windows, kinds of rope, activations, GPT-2's dropouts.
"""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lab.analytic import predict
from lab.analytic.architecture import num_parameters
from lab.config import ConfigError, load
from lab.units import GIB

SEED, POINTS, HF_MODELS = 20261201, 110, 24
HEAD_DIMS = [16, 24, 32, 36, 40, 48, 50, 64, 64, 72, 80, 96, 100, 112, 128, 128, 160, 192, 256]
VOCABULARIES = [8192, 9973, 16384, 30522, 32000, 32768, 49152, 50257, 50304, 65024, 100000, 151936, 200019, 256000]
STRATEGIES = ["single"] * 7 + ["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op"]
MODELS = Path("experiments/h200_blind7/models")


def heads(rng: random.Random) -> tuple[int, int]:
    """Query heads, and key and value heads that divide them."""
    query = rng.randint(1, 24)
    return query, rng.choice([query, query, *(n for n in range(1, query + 1) if query % n == 0)])


def shape(rng: random.Random) -> dict[str, str]:
    """A model of the lab's own."""
    query, key = heads(rng)
    head_dim = rng.choice(HEAD_DIMS)
    hidden = query * head_dim if rng.random() < 0.6 else rng.randrange(64, 3000, rng.choice([1, 2, 8, 64]))
    drawn = {
        "num_layers": rng.randint(1, 14),
        "hidden_size": hidden,
        "intermediate_size": rng.choice([4 * hidden, rng.randint(100, 9000), rng.randrange(128, 9000, 64)]),
        "num_heads": query,
        "num_kv_heads": key,
        "head_dim": head_dim,
        "vocab_size": rng.choice([*VOCABULARIES, rng.randint(8192, 260000)]),
        "max_seq_len": 32768,
    }
    return {f"model.{k}": str(v) for k, v in drawn.items()}


def hf_model(rng: random.Random) -> dict[str, Any]:
    """A config.json."""
    query, key = heads(rng)
    head_dim = rng.choice([d for d in HEAD_DIMS if d % 2 == 0])
    layers, vocabulary = rng.randint(1, 10), rng.choice([*VOCABULARIES, rng.randint(8192, 260000)])
    family = rng.choice(["llama", "llama", "mistral", "qwen2", "qwen2", "qwen3", "gemma", "gpt2", "gpt2"])
    if family == "gpt2":
        drawn = {
            "n_embd": query * head_dim,
            "n_layer": layers,
            "n_head": query,
            "n_positions": 8192,
            "activation_function": rng.choice(["gelu_new", "gelu", "gelu_pytorch_tanh"]),
            **{k: rng.choice([0.0, 0.1]) for k in ("attn_pdrop", "embd_pdrop", "resid_pdrop")},
            "n_inner": rng.choice([None, None, rng.randint(100, 6000)]),
        }
    else:
        hidden = query * head_dim if rng.random() < 0.6 else rng.randrange(64, 3000, 8)
        drawn = {
            "hidden_size": hidden,
            "intermediate_size": rng.randint(100, 9000),
            "num_hidden_layers": layers,
            "num_attention_heads": query,
            "num_key_value_heads": key,
            "head_dim": head_dim,
            "max_position_embeddings": 32768,
            "hidden_act": rng.choice(["silu", "silu", "gelu_pytorch_tanh", "gelu"]),
            "rope_theta": 10000.0,
            "attention_dropout": rng.choice([0.0, 0.0, 0.1]),
            "attention_bias": rng.choice([False, True]),
        }
        if family == "qwen2":  # its attention takes hidden_size / heads
            drawn |= {"hidden_size": query * head_dim}
        if family == "llama":
            drawn["mlp_bias"] = rng.choice([False, True])
            scaling = {"rope_type": "linear", "factor": 4.0}
            drawn["rope_scaling"] = rng.choice([None, scaling])
        if family == "mistral":
            drawn["sliding_window"] = rng.choice([None, 256, 1024, 4096])
        if family in ("qwen2", "qwen3"):
            drawn |= {"use_sliding_window": rng.choice([False, True]), "sliding_window": 512}
            drawn["max_window_layers"] = rng.randint(0, layers)
    tied = rng.choice([False, True])
    return {"model_type": family, "vocab_size": vocabulary, "tie_word_embeddings": tied, **drawn}


def quick(third: SimpleNamespace, settings: list[str]) -> bool:
    """Whether the lab takes the point, host and GPU are quick with it, and others have room beside it."""
    given = dict(s.split("=", 1) for s in settings)
    try:
        cfg = load([f"{k}={v}" for k, v in {**third.BASE, **given}.items()])
    except ConfigError:
        return False
    blocks = cfg.model.num_layers * cfg.train.gradient_accumulation_steps
    tokens = cfg.train.micro_batch_size * cfg.train.seq_len
    if blocks > 40 or tokens > 65536 or num_parameters(cfg.model) > 1.5e9 or third.operations(cfg) > 5e13:
        return False
    return predict(cfg).steady.device_used_bytes <= 30 * GIB


def main() -> int:
    third = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "h200_blind3" / "draw.py")))
    rng = random.Random(SEED)
    files = []
    for i in range(HF_MODELS):
        model = hf_model(rng)
        files.append(MODELS / f"{model['model_type']}_{i}.json")
        files[-1].write_text(json.dumps(model, indent=2) + "\n", encoding="utf-8")
    third.STRATEGIES[1] = STRATEGIES
    third.OF_MODEL["hf"] = {"model.path": (0.0, [str(f) for f in files])}
    for sized in ("num_kv_heads", "vocab_size", "num_layers", "intermediate_size", "head_dim"):
        del third.OF_MODEL["lab"][f"model.{sized}"]
    del third.OF_MODEL["lab"]["model"]
    third.DRAWS["train.expandable_segments"] = (0.85, ["true"])
    third.DRAWS["optimizer.weight_decay"] = (0.8, ["0"])
    third.OF_CHOICE["loss=chunked"] = {"loss.num_chunks": (0.3, ["1", "3", "7", "16"])}
    found = 0
    while found < POINTS:
        third.DRAWS["train.seq_len"] = (0.1, [str(rng.choice([rng.randint(16, 4096), rng.randint(16, 16384)]))])
        third.DRAWS["train.micro_batch_size"] = (0.1, [str(rng.randint(1, 24))])
        third.DRAWS["train.steps"] = (0.5, [str(rng.choice([3, 5, 6, 8]))])
        settings = third.drawn(rng, 1)
        if "model=hf" not in settings:
            settings += [f"{k}={v}" for k, v in shape(rng).items()]
        if quick(third, settings):
            found += 1
            print(f"  - {' '.join(settings)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
