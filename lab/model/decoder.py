"""One decoder-only transformer in plain PyTorch, with the options that matter for memory.

It knows no strategy, precision or checkpointing. Shapes: b = micro_batch_size, s = seq_len,
h = hidden_size, n = num_heads, k = num_kv_heads, d = head_dim, v = vocab_size.

``lab.analytic`` mirrors this file operation by operation: a change of the order in which tensors
are made or dropped here is a change of the memory there. Local variables are dropped (``del``,
re-binding, passing temporaries on) where the field's usual code does so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.config import AttentionConfig, LossConfig, ModelConfig
from lab.model.attention import attention
from lab.model.loss import language_model_loss
from lab.vocab import AttentionBackend


def build_norm(cfg: ModelConfig) -> nn.Module:
    """RMSNorm (weight only) or LayerNorm (bias with ``model.bias``)."""
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.hidden_size, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.hidden_size, eps=cfg.norm_eps, bias=cfg.bias)


def rope_tables(seq_len: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary position embedding (Su 2021, 2104.09864), each fp32 [s, d]."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [b, n, s, d] by the tables [s, d], which have x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads. x [b, s, h] -> [b, s, h]."""

    def __init__(self, cfg: ModelConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.backend, self.dropout = backend, cfg.dropout
        q_size, kv_size = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.fused = cfg.fused_qkv
        if cfg.fused_qkv:
            self.qkv_proj = nn.Linear(cfg.hidden_size, q_size + 2 * kv_size, bias=cfg.bias)
        else:
            self.q_proj = nn.Linear(cfg.hidden_size, q_size, bias=cfg.bias)
            self.k_proj = nn.Linear(cfg.hidden_size, kv_size, bias=cfg.bias)
            self.v_proj = nn.Linear(cfg.hidden_size, kv_size, bias=cfg.bias)
        self.o_proj = nn.Linear(cfg.num_heads * cfg.head_dim, cfg.hidden_size, bias=cfg.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, s, h] -> q [b, s, n * d], k and v [b, s, k * d]; fused: three views of one output."""
        if self.fused:
            sizes = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
            q, k, v = self.qkv_proj(x).split(sizes, dim=-1)
            return q, k, v
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.project(x)
        q = q.view(b, s, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(b, s, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(b, s, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if cos is not None and sin is not None:
            q = apply_rope(q, cos, sin)
            k = apply_rope(k, cos, sin)
        y = attention(q, k, v, self.backend, self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(b, s, self.num_heads * self.head_dim))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, 2002.05202)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.bias)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.bias)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GeluMLP(nn.Module):
    """down(gelu(up(x))), GPT-2's tanh approximation."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.bias)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.attention_norm = build_norm(cfg)
        self.attention = Attention(cfg, backend)
        self.mlp_norm = build_norm(cfg)
        self.mlp = SwiGLU(cfg) if cfg.mlp == "swiglu" else GeluMLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout) if cfg.dropout else None

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        y = self.attention(self.attention_norm(x), cos, sin)
        x = x + (self.dropout(y) if self.dropout else y)
        y = self.mlp(self.mlp_norm(x))
        return x + (self.dropout(y) if self.dropout else y)


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head. ``forward(tokens, targets)`` returns the mean loss."""

    def __init__(self, cfg: ModelConfig, attention_cfg: AttentionConfig, loss_cfg: LossConfig) -> None:
        super().__init__()
        self.cfg, self.loss_cfg = cfg, loss_cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position = nn.Embedding(cfg.max_seq_len, cfg.hidden_size) if cfg.position == "learned" else None
        self.dropout = nn.Dropout(cfg.dropout) if cfg.dropout else None
        self.blocks = nn.ModuleList(Block(cfg, attention_cfg.backend) for _ in range(cfg.num_layers))
        self.norm = build_norm(cfg)
        self.head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tied_head:
            self.head.weight = self.embedding.weight
        self._rope: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def rope(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin [s, d] in the compute dtype, made at the first forward and kept."""
        if self.cfg.position != "rope":
            return None, None
        key = (seq_len, device, dtype)
        if key not in self._rope:
            cos, sin = rope_tables(seq_len, self.cfg.head_dim, self.cfg.rope_theta, device)
            self._rope[key] = (cos.to(dtype), sin.to(dtype))
        return self._rope[key]

    def cached_tensors(self) -> list[Tensor]:
        """What lives on the device beside the parameters: the rope tables, once a forward made them."""
        return [table for pair in self._rope.values() for table in pair]

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets int64 [b, s] -> fp32 scalar, the mean cross entropy over b * s tokens."""
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        if self.dropout is not None:
            x = self.dropout(x)
        device_type = tokens.device.type
        autocast = torch.is_autocast_enabled(device_type)
        compute_dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
        cos, sin = self.rope(tokens.shape[1], tokens.device, compute_dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return language_model_loss(self.head, self.norm(x), targets, self.loss_cfg)
