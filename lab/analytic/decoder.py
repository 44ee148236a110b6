"""The forward pass of ``lab.model.decoder``, operation by operation, over symbolic tensors.

Names, order and the moments at which local variables are dropped mirror that file line by line.
``hooks`` is how a strategy or checkpointing wraps a block: the same places at which engines hook modules.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

from lab.analytic.attention import AttentionShape, attention, choose_backend
from lab.analytic.checkpoint import checkpoint
from lab.analytic.norms import rmsnorm_composite
from lab.analytic.ops import Ops, Parameter
from lab.analytic.tape import FP32, Tensor
from lab.config import RunConfig
from lab.vocab import Checkpointing


class Hooks(Protocol):
    """What a strategy does around modules. ``unit`` -1 is the root, otherwise a block's index.

    ``enter`` and ``leave`` surround every module that is called, the root ("") included, and return what hooks make
    of its input and output; ``enter_source`` is for inputs that carry no gradient (tokens, position ids).
    """

    def pre_forward(self, unit: int) -> None: ...
    def post_forward(self, unit: int, out: Tensor) -> Tensor: ...
    def wrap_input(self, unit: int, x: Tensor) -> Tensor: ...
    def enter_source(self, module: str) -> None: ...
    def enter(self, module: str, x: Tensor) -> Tensor: ...
    def leave(self, module: str, y: Tensor) -> Tensor: ...


class Decoder:
    """One rank's model: parameters by name, the operations, the strategy's hooks."""

    def __init__(self, cfg: RunConfig, ops: Ops, params: dict[str, Parameter], hooks: Hooks) -> None:
        self.cfg, self.ops, self.p, self.hooks = cfg, ops, params, hooks
        m, t = cfg.model, cfg.train
        self.shape = AttentionShape(t.micro_batch_size, t.seq_len, m.num_heads, m.num_kv_heads, m.head_dim)
        self.rows = t.micro_batch_size * t.seq_len
        self.composite_rmsnorm = m.norm == "rmsnorm" and cfg.hardware.device_type == "cpu"
        self.backend = choose_backend(
            cfg.attention.backend, cfg.hardware.device_type, cfg.precision.kind, self.shape, m.dropout
        )

    def _linear(self, x: Tensor, name: str, label: str, rows: int | None = None) -> Tensor:
        x = self.hooks.enter(name, x)
        y = self.ops.linear(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"), rows or self.rows, label)
        return self.hooks.leave(name, y)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        x = self.hooks.enter(name, x)
        weight, bias = self.p[f"{name}.weight"], self.p.get(f"{name}.bias")
        if self.composite_rmsnorm:
            y = rmsnorm_composite(self.ops, x, weight, self.rows, name)
        else:
            y = self.ops.norm(x, weight, bias, self.rows, self.cfg.model.norm, name)
        return self.hooks.leave(name, y)

    def _dropout(self, x: Tensor, name: str, label: str) -> Tensor:
        x = self.hooks.enter(name, x)
        return self.hooks.leave(name, self.ops.dropout(x, label))

    def _embedding(self, name: str, rows: int, indices: Tensor | None = None) -> Tensor:
        self.hooks.enter_source(name)
        table = self.p[f"{name}.weight"]
        return self.hooks.leave(name, self.ops.embedding(table, rows * table.shape[1], name, rows, indices))

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        x = self.hooks.enter(prefix, x)
        if self.cfg.model.fused_qkv:
            a = self.shape
            qkv = self._linear(x, f"{prefix}.qkv_proj", "query, key and value")
            q, k, v = self.ops.split(qkv, [a.q_numel, a.kv_numel, a.kv_numel], "query, key and value gradient")
            del qkv
        else:
            q = self._linear(x, f"{prefix}.q_proj", "query")
            k = self._linear(x, f"{prefix}.k_proj", "key")
            v = self._linear(x, f"{prefix}.v_proj", "value")
        if self.cfg.model.position == "rope":
            q = self.ops.rope(q, "query")
            k = self.ops.rope(k, "key")
        y = attention(self.ops, q, k, v, self.shape, self.backend, self.cfg.model.dropout)
        out = self._linear(y, f"{prefix}.o_proj", "attention projection")
        del q, k, v, y
        return self.hooks.leave(prefix, out)

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        x = self.hooks.enter(prefix, x)
        if self.cfg.model.mlp == "gelu":
            up = self._linear(x, f"{prefix}.up_proj", "mlp up")
            up = self.ops.gelu(up)
            return self.hooks.leave(prefix, self._linear(up, f"{prefix}.down_proj", "mlp down"))
        gate = self._linear(x, f"{prefix}.gate_proj", "mlp gate")
        gate = self.ops.silu(gate)
        up = self._linear(x, f"{prefix}.up_proj", "mlp up")
        product = self.ops.mul(gate, up, "mlp product")
        del gate, up
        return self.hooks.leave(prefix, self._linear(product, f"{prefix}.down_proj", "mlp down"))

    def block(self, i: int, x: Tensor) -> Tensor:
        """Block i. Its input stays referenced by the caller until it returns."""
        b = f"blocks.{i}"
        y = self._attention(self._norm(x, f"{b}.attention_norm"), f"{b}.attention")
        dropped = self._dropout(y, f"{b}.dropout", "residual dropout") if self.cfg.model.dropout else y
        x = self.ops.add(x, dropped, "residual")
        del dropped
        y = self._mlp(self._norm(x, f"{b}.mlp_norm"), f"{b}.mlp")
        dropped = self._dropout(y, f"{b}.dropout", "residual dropout") if self.cfg.model.dropout else y
        return self.ops.add(x, dropped, "residual")

    def _checkpointed(self, i: int) -> bool:
        kind = self.cfg.checkpointing.kind
        if kind is Checkpointing.EVERY_K:
            return i % self.cfg.checkpointing.every_k == 0
        return kind is not Checkpointing.NONE

    def forward(self) -> Tensor:
        """The loss, one fp32 scalar."""
        cfg, ops, hooks = self.cfg, self.ops, self.hooks
        hooks.pre_forward(-1)
        hooks.enter_source("")
        x = self._embedding("embedding", self.rows)
        if cfg.model.position == "learned":
            positions = ops.new(cfg.train.seq_len, 8, "position ids")
            y = self._embedding("position", cfg.train.seq_len, positions)
            total = ops.add(x, y, "embedding sum", broadcast=True)
            del y
            x = total
            del total, positions
        if cfg.model.dropout:
            x = self._dropout(x, "dropout", "embedding dropout")
        for i in range(cfg.model.num_layers):
            run = partial(self.block, i)
            x = hooks.wrap_input(i, x)
            hooks.pre_forward(i)
            y = hooks.enter(f"blocks.{i}", x)
            if self._checkpointed(i):
                y = checkpoint(ops, run, y, selective=cfg.checkpointing.kind is Checkpointing.SELECTIVE)
            else:
                y = run(y)
            x = hooks.leave(f"blocks.{i}", y)
            del y
            x = hooks.post_forward(i, x)
        if cfg.loss.kind == "cross_entropy":
            loss = self._head_loss(self._norm(x, "norm"), self.rows)
        else:
            loss = self._chunked_loss(self._norm(x, "norm"))
        del x  # forward's local variable: alive until the loss is there
        return hooks.post_forward(-1, hooks.leave("", loss))

    def _head_loss(self, x: Tensor, rows: int, keep_logits: bool = False) -> Tensor:
        """Logits, their fp32 copy, the loss. ``keep_logits``: a local variable holds the logits to the end."""
        name = "embedding" if self.cfg.model.tied_head else "head"
        x = self.hooks.enter("head", x)
        logits = self.hooks.leave("head", self.ops.linear(x, self.p[f"{name}.weight"], None, rows, "logits"))
        wide = self.ops.cast(logits, FP32, "logits, fp32")
        if not keep_logits:
            del logits
        return self.ops.cross_entropy(wide, rows)

    def _chunked_loss(self, x: Tensor) -> Tensor:
        """lab.model.loss: chunks of ceil(rows / num_chunks) tokens, each checkpointed, their losses summed."""
        ops, hidden = self.ops, self.cfg.model.hidden_size
        size = -(-self.rows // self.cfg.loss.num_chunks)
        counts = [min(size, self.rows - start) for start in range(0, self.rows, size)]
        total = ops.new(1, x.itemsize, "loss sum")
        split = ops.split(x, [c * hidden for c in counts], "chunk gradients")
        for chunk, count in zip(split, counts, strict=True):
            part = checkpoint(ops, partial(self._head_loss, rows=count, keep_logits=True), chunk, selective=False)
            total = ops.add(total, part, "loss sum")
            del part
        return ops.scale(total, "loss")
