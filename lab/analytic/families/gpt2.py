"""transformers' GPT-2, line by line (models/gpt2/modeling_gpt2.py): Conv1D, gelu_new, three dropouts."""

from __future__ import annotations

from typing import Any

from lab.analytic.attention import in_heads
from lab.analytic.families.base import HFDecoder
from lab.analytic.families.inventory import PREFIX, blocks_prefix, embedding_module
from lab.analytic.families.masks import Masks
from lab.analytic.families.pieces import conv1d, gelu_new
from lab.analytic.tape import Tensor
from lab.vocab import AttentionBackend


class GPT2(HFDecoder):
    """GPT2LMHeadModel."""

    def _conv1d(self, x: Tensor, name: str, label: str) -> Tensor:
        return self.linears(x, name, label, self.rows, self._plain_conv1d)

    def _plain_conv1d(self, x: Tensor, name: str, label: str) -> Tensor:
        return conv1d(self.ops, x, self.p[f"{name}.weight"], self.p[f"{name}.bias"], self.rows, label)

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        x = self.hooks.enter(name, x)
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        return self.hooks.leave(name, self.ops.norm(x, weight, bias, self.rows, "layernorm", name))

    def _drop(self, x: Tensor, name: str, label: str, probability: float) -> Tensor:
        """nn.Dropout; with probability 0 it returns its input."""
        x = self.hooks.enter(name, x)
        return self.hooks.leave(name, self.ops.dropout(x, label) if probability else x)

    def model(self) -> Tensor:
        name, hf = f"{PREFIX}transformer", self.cfg.model.hf
        self.hooks.enter_source(name)
        embedded = self._require_gradient(self._embedding(embedding_module(self.cfg.model), self.rows))
        positions = self._positions()
        position = self._embedding(f"{name}.wpe", self.cfg.train.seq_len, positions)
        several = self.cfg.train.micro_batch_size > 1  # one sequence is as large as its positions
        x = self.ops.add(embedded, position, "embedding sum", broadcast=several)
        masks = Masks(self._mask(embedded.itemsize))
        first = [self._drop(x, f"{name}.drop", "embedding dropout", hf.embedding_dropout)]
        del x
        x = self._hf_blocks(first, masks, positions)
        x = self._layer_norm(x, f"{name}.ln_f")
        del embedded, position, positions, masks  # local variables of GPT2Model.forward
        return self.hooks.leave(name, x)

    def layer(self, i: int, *arguments: Any) -> Tensor:
        mask, _, x = arguments
        b = f"{blocks_prefix(self.cfg.model)}.{i}"
        y = self._layer_norm(x, f"{b}.ln_1")
        attended, weights = self._attended(y, mask, f"{b}.attn")
        y = self.ops.add(attended, x, "residual")
        del arguments
        x = y
        y = self._layer_norm(x, f"{b}.ln_2")
        fed = self._fed_forward(y, f"{b}.mlp")
        out = self.ops.add(x, fed, "residual")
        del y  # its variable has the sum now; then the local variables of GPT2Block.forward in their order
        del x
        del attended, weights, fed
        return out

    def _attended(self, x: Tensor, mask: Tensor | None, prefix: str) -> tuple[Tensor, Tensor | None]:
        x = self.hooks.enter(prefix, x)
        y, weights = self._attended_forward(x, mask, prefix)
        return self.hooks.leave(prefix, y), weights

    def _attended_forward(self, x: Tensor, mask: Tensor | None, prefix: str) -> tuple[Tensor, Tensor | None]:
        ops, a = self.ops, self.shape
        qkv = self._conv1d(x, f"{prefix}.c_attn", "query, key and value")
        q, k, v = ops.split(qkv, [a.q_numel, a.kv_numel, a.kv_numel], "query, key and value gradient")
        backend = AttentionBackend.EAGER if mask is not None else self.backend
        q, k, v = in_heads(ops, q, k, v, a, backend, query_last=True)
        del qkv
        y, weights = self._attend(q, k, v, mask, gpt2=True)
        y = self._conv1d(y, f"{prefix}.c_proj", "attention projection")
        y = self._drop(y, f"{prefix}.resid_dropout", "residual dropout", self.cfg.model.hf.residual_dropout)
        return y, weights

    def _fed_forward(self, x: Tensor, prefix: str) -> Tensor:
        x = self.hooks.enter(prefix, x)
        return self.hooks.leave(prefix, self._fed_forward_forward(x, prefix))

    def _fed_forward_forward(self, x: Tensor, prefix: str) -> Tensor:
        x = self._conv1d(x, f"{prefix}.c_fc", "mlp up")
        y = self.hooks.enter(f"{prefix}.act", x)
        x = self.hooks.leave(f"{prefix}.act", self._act(y))
        del y
        x = self._conv1d(x, f"{prefix}.c_proj", "mlp down")
        return self._drop(x, f"{prefix}.dropout", "residual dropout", self.cfg.model.hf.residual_dropout)

    def _act(self, x: Tensor) -> Tensor:
        kind = self.cfg.model.hf.activation
        if kind == "gelu_new":
            return gelu_new(self.ops, x)
        return self.ops.silu(x) if kind == "silu" else self.ops.gelu(x)
