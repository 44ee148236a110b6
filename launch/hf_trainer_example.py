#!/usr/bin/env python3
"""MemoryCallback in a transformers.Trainer run: a small random model, a text made on the spot, no download.

    python launch/hf_trainer_example.py
    torchrun --standalone --nproc-per-node 2 launch/hf_trainer_example.py --checkpointing --layers 16 --hidden 2048

The record appears under outputs/hf_trainer; `lab compare outputs/hf_trainer` shows it.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Trainer, TrainingArguments

from lab.integrations import MemoryCallback


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in [("layers", 2), ("hidden", 64), ("heads", 4), ("vocab", 256), ("batch", 2), ("seq", 64)]:
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in [("steps", 4), ("accumulation", 1)]:
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--window", type=int, default=0, help="a Mistral with this sliding window; 0: a Llama")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--lora", type=int, default=0, help="rank of peft adapters on every Linear; 0: none")
    parser.add_argument("--nf4", action="store_true", help="QLoRA: weights in NF4, doubly quantized; with --lora")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=0, help="DeepSpeed's stage; with torchrun")
    parser.add_argument("--name", default="hf_trainer", help="folder of the record under outputs/")
    return parser.parse_args()


def deepspeed_config(stage: int, precision: str) -> dict[str, Any]:
    """What one writes for a Trainer: what "auto" stands for comes from its arguments."""
    return {
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": precision == "bf16"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }


def sequences(count: int, length: int) -> list[dict[str, list[int]]]:
    """Bytes of a text, cut into sequences of one length."""
    text = " ".join(f"{i} times {i} is {i * i}." for i in range(count * length // 8)).encode()
    parts = [list(text[i * length : (i + 1) * length]) for i in range(count)]
    return [{"input_ids": part, "attention_mask": [1] * length, "labels": part} for part in parts]


def quantized(model: PreTrainedModel, checkpointing: bool) -> PreTrainedModel:
    """Saved and loaded again in 4 bit, as one loads a checkpoint for QLoRA."""
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.bfloat16)
    return prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=checkpointing)


def main() -> None:
    options = parse()
    kind = MistralConfig if options.window else LlamaConfig
    config = kind(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=max(options.seq, 128),
        attn_implementation=options.attention,
        **({"sliding_window": options.window} if options.window else {}),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.weights))
    if options.nf4:
        model = quantized(model, options.checkpointing)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=options.lora, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter)
    arguments = TrainingArguments(
        output_dir="outputs/hf_trainer_checkpoints",
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        max_steps=options.steps,
        bf16=options.precision == "bf16",
        **({"gradient_checkpointing": True} if options.checkpointing else {}),
        optim=options.optim,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        **({"deepspeed": deepspeed_config(options.zero, options.precision)} if options.zero else {}),
    )
    data = sequences(options.batch * options.accumulation * options.steps * 8, options.seq)
    Trainer(model, arguments, train_dataset=data, callbacks=[MemoryCallback(name=options.name)]).train()


if __name__ == "__main__":
    main()
