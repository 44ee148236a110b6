"""Parameters of transformers' decoder families, in ``nn.Module.parameters()`` order, as the lab's adapter names them.

Source: transformers 5.17 and 5.23, models/{llama,mistral,qwen2,qwen3,gemma,gpt2}/modeling_*.py, the modules' __init__.
"""

from __future__ import annotations

from lab.analytic.architecture import ParameterSpec
from lab.analytic.tape import BF16, FP32
from lab.config import ModelConfig, RunConfig
from lab.vocab import Precision

PREFIX = "hf."  # lab.model.hf.HFCausalLM's attribute


def hf_parameters(model: ModelConfig) -> list[ParameterSpec]:
    """Every parameter; a tied head adds none."""
    return _gpt2(model) if model.family == "gpt2" else _llama(model)


def blocks_prefix(model: ModelConfig) -> str:
    """Name of the list of blocks."""
    return f"{PREFIX}transformer.h" if model.family == "gpt2" else f"{PREFIX}model.layers"


def embedding_module(model: ModelConfig) -> str:
    """Name of the token embedding, with which a tied head shares its weight."""
    return f"{PREFIX}transformer.wte" if model.family == "gpt2" else f"{PREFIX}model.embed_tokens"


def buffers(cfg: RunConfig) -> list[tuple[str, int, int]]:
    """(label, elements, element size) of the model's buffers: rotary frequencies twice, Gemma's embedding scale.

    fp32 in every precision (the frequencies say so, and DeepSpeed 0.19 leaves buffers alone); the scale has the type
    that the parameters were made in. The lab's own models have none.
    """
    model = cfg.model
    if model.family == "lab" or model.position != "rope":
        return []
    found = [("rotary frequencies", model.head_dim // 2, FP32)] * 2
    if model.family == "gemma":
        narrow = cfg.precision.kind is Precision.BF16_PURE
        narrow = narrow or (bool(cfg.parallel.strategy.zero_stage) and cfg.precision.kind is not Precision.FP32)
        found.insert(0, ("embedding scale", 1, BF16 if narrow else FP32))
    return found


def _llama(m: ModelConfig) -> list[ParameterSpec]:
    h, f, d = m.hidden_size, m.intermediate_size, m.head_dim
    q, kv = m.num_heads * d, m.num_kv_heads * d
    specs = [ParameterSpec(f"{embedding_module(m)}.weight", (m.vocab_size, h), -1)]

    def linear(name: str, out_features: int, in_features: int, bias: bool, unit: int) -> None:
        specs.append(ParameterSpec(f"{name}.weight", (out_features, in_features), unit, linear=True))
        if bias:
            specs.append(ParameterSpec(f"{name}.bias", (out_features,), unit))

    for i in range(m.num_layers):
        b = f"{blocks_prefix(m)}.{i}"
        linear(f"{b}.self_attn.q_proj", q, h, m.bias, i)
        linear(f"{b}.self_attn.k_proj", kv, h, m.bias, i)
        linear(f"{b}.self_attn.v_proj", kv, h, m.bias, i)
        linear(f"{b}.self_attn.o_proj", h, q, m.hf.output_bias, i)
        if m.hf.qk_norm:
            specs += [ParameterSpec(f"{b}.self_attn.{name}.weight", (d,), i) for name in ("q_norm", "k_norm")]
        linear(f"{b}.mlp.gate_proj", f, h, m.hf.mlp_bias, i)
        linear(f"{b}.mlp.up_proj", f, h, m.hf.mlp_bias, i)
        linear(f"{b}.mlp.down_proj", h, f, m.hf.mlp_bias, i)
        specs += [ParameterSpec(f"{b}.{n}.weight", (h,), i) for n in ("input_layernorm", "post_attention_layernorm")]
    specs.append(ParameterSpec(f"{PREFIX}model.norm.weight", (h,), -1))
    if not m.tied_head:
        specs.append(ParameterSpec(f"{PREFIX}lm_head.weight", (m.vocab_size, h), -1, linear=True))
    return specs


def _gpt2(m: ModelConfig) -> list[ParameterSpec]:
    h, f = m.hidden_size, m.intermediate_size
    specs = [
        ParameterSpec(f"{embedding_module(m)}.weight", (m.vocab_size, h), -1),
        ParameterSpec(f"{PREFIX}transformer.wpe.weight", (m.max_seq_len, h), -1),
    ]

    def both(name: str, shape: tuple[int, ...], bias: int, unit: int) -> None:
        matrix = len(shape) > 1
        specs.append(ParameterSpec(f"{name}.weight", shape, unit, linear=matrix, transposed=matrix))
        specs.append(ParameterSpec(f"{name}.bias", (bias,), unit))

    for i in range(m.num_layers):  # Conv1D's weight is [in, out]
        b = f"{blocks_prefix(m)}.{i}"
        both(f"{b}.ln_1", (h,), h, i)
        both(f"{b}.attn.c_attn", (h, 3 * h), 3 * h, i)
        both(f"{b}.attn.c_proj", (h, h), h, i)
        both(f"{b}.ln_2", (h,), h, i)
        both(f"{b}.mlp.c_fc", (h, f), f, i)
        both(f"{b}.mlp.c_proj", (f, h), h, i)
    both(f"{PREFIX}transformer.ln_f", (h,), h, -1)
    if not m.tied_head:
        specs.append(ParameterSpec(f"{PREFIX}lm_head.weight", (m.vocab_size, h), -1, linear=True))
    return specs
