"""transformers' Llama, Mistral, Qwen2, Qwen3 and Gemma, line by line (models/*/modeling_*.py).

Qwen3 adds a norm per head on query and key; Gemma scales the embedding, normalises with 1 + weight in fp32.
"""

from __future__ import annotations

from typing import Any

from lab.analytic.attention import heads_first
from lab.analytic.families.base import HFDecoder
from lab.analytic.families.inventory import PREFIX, blocks_prefix, embedding_module
from lab.analytic.families.masks import Masks
from lab.analytic.families.pieces import apply_rotary, gelu_new, gemma_rmsnorm, reshaped, rmsnorm, times_constant
from lab.analytic.tape import FP32, Tensor
from lab.vocab import MemoryCategory, Precision


class Llama(HFDecoder):
    """LlamaForCausalLM and what is generated from it."""

    def _rms(self, x: Tensor, name: str, rows: int) -> Tensor:
        norm = gemma_rmsnorm if self.cfg.model.family == "gemma" else rmsnorm
        x = self.hooks.enter(name, x)
        return self.hooks.leave(name, norm(self.ops, x, self.p[f"{name}.weight"], rows, name))

    def model(self) -> Tensor:
        name = f"{PREFIX}model"
        self.hooks.enter_source(name)
        x = self._require_gradient(self._embed())
        positions = self._positions()
        masks = self._masks(x.itemsize)
        self.hooks.enter_source(f"{name}.rotary_emb")
        cos, sin = self._rotary(x.itemsize)
        y = self._hf_blocks([x], masks, positions, cos, sin)  # inputs_embeds stays a local variable
        y = self._rms(y, f"{name}.norm", self.rows)
        del positions, masks, cos, sin, x
        return self.hooks.leave(name, y)

    def _masks(self, size: int) -> Masks:
        """Mistral makes one mask for all layers; Qwen one for full layers, used or not, and one for sliding ones."""
        model = self.cfg.model
        if model.family == "mistral":
            mask = self._mask(size, sliding=model.hf.sliding_window is not None)
            return Masks(mask, mask)
        full = self._mask(size)
        slide = any(model.hf.slides(i) for i in range(model.num_layers))
        return Masks(full, self._mask(size, sliding=True) if slide else None)

    def _embed(self) -> Tensor:
        x = self._embedding(embedding_module(self.cfg.model), self.rows)
        if self.cfg.model.family != "gemma":
            return x
        # embed_scale.to(weight.dtype): the buffer itself, unless FSDP gathers the weight in another type.
        cast = self.cfg.parallel.strategy.is_fsdp and self.cfg.precision.kind in (
            Precision.BF16_MIXED,
            Precision.FP16_MIXED,
        )
        scale = self.ops.new(int(cast), x.itemsize, "embedding scale")
        return times_constant(self.ops, x, scale, "embedding scaled")

    def _rotary(self, size: int) -> tuple[Tensor, Tensor]:
        """LlamaRotaryEmbedding.forward: cos and sin [1, s, d] in the hidden states' type."""
        ops, numel = self.ops, self.cfg.train.seq_len * self.cfg.model.head_dim
        positions = ops.new(self.cfg.train.seq_len, FP32, "rotary positions")
        freqs = ops.new(numel // 2, FP32, "rotary angles")
        ops.matmul_workspace("forward", lt=False)  # inv_freq @ positions
        angles = ops.new(numel, FP32, "rotary angles")
        tables = []
        for name in ("cos", "sin"):
            plain = ops.new(numel, FP32, f"rotary {name}")
            tables.append(ops.new(numel, FP32, f"rotary {name}", MemoryCategory.ACTIVATIONS))  # * attention_scaling
            del plain
        cos, sin = tables
        del tables
        narrow = ops.cast_alone(cos, size, "rotary cos"), ops.cast_alone(sin, size, "rotary sin")
        del positions, freqs, angles, cos, sin
        return narrow

    def layer(self, i: int, *arguments: Any) -> Tensor:
        mask, _, cos, sin, x = arguments
        b = f"{blocks_prefix(self.cfg.model)}.{i}"
        y = self._rms(x, f"{b}.input_layernorm", self.rows)
        y, weights = self._self_attention(y, mask, cos, sin, f"{b}.self_attn")
        summed = self.ops.add(x, y, "residual")
        del arguments, y
        x = summed
        del summed
        y = self._rms(x, f"{b}.post_attention_layernorm", self.rows)
        y = self._hf_mlp(y, f"{b}.mlp")
        out = self.ops.add(x, y, "residual")
        del y  # its variable has the sum now; then the local variables in their order
        del x
        del weights  # the layer's `_`
        return out

    def _self_attention(
        self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, prefix: str
    ) -> tuple[Tensor, Tensor | None]:
        self.hooks.enter_source(prefix)
        y, weights = self._self_attention_forward(x, mask, cos, sin, prefix)
        return self.hooks.leave(prefix, y), weights

    def _self_attention_forward(
        self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, prefix: str
    ) -> tuple[Tensor, Tensor | None]:
        ops, a = self.ops, self.shape
        q = self._head_projection(x, f"{prefix}.q_proj", "query", a.n)
        k = self._head_projection(x, f"{prefix}.k_proj", "key", a.k)
        v = self._linear(x, f"{prefix}.v_proj", "value")
        repeated = mask is not None and a.n != a.k  # the heads' summed gradient lies head by head
        if (repeated or heads_first(ops, a, self._backend_with(mask))) and a.k > 1:
            v = reshaped(ops, v, "value")
        turned = apply_rotary(ops, q, cos, sin, "query"), apply_rotary(ops, k, cos, sin, "key")
        q, k = turned
        del turned
        y, weights = self._attend(q, k, v, mask, gpt2=False)
        out = self._linear(y, f"{prefix}.o_proj", "attention projection")
        del y  # its variable has the projection now
        del q
        del k
        del v
        return out, weights

    def _head_projection(self, x: Tensor, name: str, label: str, heads: int) -> Tensor:
        y = self._linear(x, name, label)
        if heads > 1:  # one head's transposed gradient is contiguous as it is
            y = reshaped(self.ops, y, label)
        if not self.cfg.model.hf.qk_norm:
            return y
        return self._rms(y, name.replace("_proj", "_norm"), self.rows * heads)

    def _hf_mlp(self, x: Tensor, prefix: str) -> Tensor:
        x = self.hooks.enter(prefix, x)
        return self.hooks.leave(prefix, self._hf_mlp_forward(x, prefix))

    def _hf_mlp_forward(self, x: Tensor, prefix: str) -> Tensor:
        gate = self._activated(self._linear(x, f"{prefix}.gate_proj", "mlp gate"), f"{prefix}.act_fn")
        up = self._linear(x, f"{prefix}.up_proj", "mlp up")
        inner = self.ops.mul(gate, up, "mlp product")
        del gate, up
        return self._linear(inner, f"{prefix}.down_proj", "mlp down")

    def _activated(self, x: Tensor, name: str) -> Tensor:
        x = self.hooks.enter(name, x)
        kind = self.cfg.model.hf.activation
        if kind == "gelu_new":
            return self.hooks.leave(name, gelu_new(self.ops, x))
        return self.hooks.leave(name, self.ops.gelu(x) if kind == "gelu" else self.ops.silu(x))
