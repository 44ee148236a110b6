"""The forward pass of ``lab.model.decoder``, operation by operation, over symbolic tensors.

Names, order and the moments at which local variables are dropped mirror that file line by line.
``hooks`` is how a strategy or checkpointing wraps a block: the same places at which engines hook modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from lab.analytic.attention import autocast_attention, contiguous, in_heads, key_comes_turned
from lab.analytic.attention_shape import AttentionShape, choose_backend, choose_masked_backend
from lab.analytic.checkpoint import checkpoint
from lab.analytic.linears import Linears
from lab.analytic.losses import cross_entropy, cross_entropy_without_upcast, in_place_cross_entropy
from lab.analytic.norms import rmsnorm_composite
from lab.analytic.ops import Ops, Parameter
from lab.analytic.tape import BF16, FP32, Tensor
from lab.config import RunConfig
from lab.vocab import Checkpointing, MemoryCategory, Precision


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
    def leaf(self, module: str, y: Tensor) -> Tensor: ...


class Decoder:
    """One rank's model: parameters by name, the operations, the strategy's hooks."""

    def __init__(self, cfg: RunConfig, ops: Ops, params: dict[str, Parameter], hooks: Hooks) -> None:
        self.cfg, self.ops, self.p, self.hooks = cfg, ops, params, hooks
        m, t = cfg.model, cfg.train
        self.shape = AttentionShape(t.micro_batch_size, t.seq_len, m.num_heads, m.num_kv_heads, m.head_dim)
        self.rows = t.micro_batch_size * t.seq_len
        self.linears = Linears(cfg, ops, params, hooks)
        self.call: Callable[[int, Tensor], Tensor] | None = None  # in place of call_block (lab.analytic.layers)
        self.rope_tables: list[Tensor] = []
        precision = cfg.precision.kind
        if precision is Precision.BF16_PURE and next(iter(params.values())).tensor.itemsize == FP32:
            precision = Precision.FP32  # upcast beside a quantized base: fp32 between the quantized products
        self.compute_itemsize = FP32 if precision is Precision.FP32 else BF16
        self.composite_rmsnorm = m.norm == "rmsnorm" and cfg.hardware.device_type == "cpu"
        asked = cfg.attention.backend, cfg.hardware.device_type, precision, self.shape, m.dropout
        self.backend, self.masked_backend = choose_backend(*asked), choose_masked_backend(*asked)

    def _linear(self, x: Tensor, name: str, label: str, rows: int | None = None) -> Tensor:
        return self.linears(x, name, label, rows or self.rows)

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

    def _make_rope_tables(self) -> None:
        """lab.model.decoder.rope_tables, at the first forward: angles, cos and sin in fp32, then their casts, kept."""
        seq_len, pairs = self.cfg.train.seq_len, self.cfg.model.head_dim // 2
        numel, size = seq_len * self.cfg.model.head_dim, self.ops.amp or self.compute_itemsize
        exponent = self.ops.new(pairs, FP32, "rope frequencies")  # torch.arange, its negative, that over the width
        for _ in range(2):
            exponent = self.ops.new(pairs, FP32, "rope frequencies")
        frequencies = self.ops.new(pairs, FP32, "rope frequencies")
        self.ops.scratch(FP32, "rope frequencies")  # pow_Scalar_out's base, as a tensor
        del exponent
        positions = self.ops.new(seq_len, FP32, "rope positions")
        angles = self.ops.new(numel // 2, FP32, "rope angles")
        del positions
        angles = self.ops.new(numel, FP32, "rope angles")
        for name in ("cos", "sin"):
            self.rope_tables.append(self.ops.new(numel, FP32, f"rope {name}", MemoryCategory.ACTIVATIONS))
        del frequencies, angles
        if size != FP32:
            self.rope_tables += [
                self.ops.new(numel, size, f"rope {name}", MemoryCategory.ACTIVATIONS) for name in ("cos", "sin")
            ]
            del self.rope_tables[:2]

    def _embedding(self, name: str, rows: int, indices: Tensor | None = None) -> Tensor:
        self.hooks.enter_source(name)
        table = self.p[f"{name}.weight"]
        return self.hooks.leave(name, self.ops.embedding(table, rows * table.shape[1], name, rows, indices))

    # Each module's forward is a function of its own: its locals go when it returns, its input when the call is over.

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        x = self.hooks.enter(prefix, x)
        return self.hooks.leave(prefix, self._attention_forward(x, prefix))

    def _attention_forward(self, x: Tensor, prefix: str) -> Tensor:
        q, k, v = in_heads(self.ops, *self._project(x, prefix), self.shape, self.backend)
        if self.cfg.model.position == "rope":
            q = self.ops.rope(q, "query")
            k = self.ops.rope(k, "key")
        y = autocast_attention(self.ops, q, k, v, self.shape, self.backend, self.cfg.model.dropout)
        return self._linear(
            contiguous(self.ops, y, self.shape, self.backend, padded_too=False),
            f"{prefix}.o_proj",
            "attention projection",
        )

    def _project(self, x: Tensor, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        if self.cfg.model.fused_qkv:
            a = self.shape
            qkv = self._linear(x, f"{prefix}.qkv_proj", "query, key and value")
            q, k, v = self.ops.split(qkv, [a.q_numel, a.kv_numel, a.kv_numel], "query, key and value gradient")
            return q, k, v
        q = self._linear(x, f"{prefix}.q_proj", "query")
        turned = key_comes_turned(self.shape, self.backend)
        k = self.linears(x, f"{prefix}.k_proj", "key", self.rows, turned=turned)
        return q, k, self._linear(x, f"{prefix}.v_proj", "value")

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        x = self.hooks.enter(prefix, x)
        return self.hooks.leave(prefix, self._mlp_forward(x, prefix))

    def _mlp_forward(self, x: Tensor, prefix: str) -> Tensor:
        if self.cfg.model.mlp == "gelu":
            activated = self.ops.gelu(self._linear(x, f"{prefix}.up_proj", "mlp up"))
        else:
            activated = self._gated(x, prefix)
        return self._linear(activated, f"{prefix}.down_proj", "mlp down")

    def _gated(self, x: Tensor, prefix: str) -> Tensor:
        gate = self.ops.silu(self._linear(x, f"{prefix}.gate_proj", "mlp gate"))
        up = self._linear(x, f"{prefix}.up_proj", "mlp up")
        return self.ops.mul(gate, up, "mlp product")

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

    def call_block(self, i: int, x: Tensor) -> Tensor:
        """Block i, checkpointed or not."""
        kind, run = self.cfg.checkpointing.kind, partial(self.block, i)
        if self.checkpointed(i):
            return checkpoint(self.ops, run, x, selective=kind is Checkpointing.SELECTIVE)
        return run(x)

    def checkpointed(self, i: int) -> bool:
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
        if cfg.model.position == "rope" and not self.rope_tables:
            self._make_rope_tables()
        for i in range(cfg.model.num_layers):
            x = hooks.wrap_input(i, x)
            hooks.pre_forward(i)
            y = hooks.enter(f"blocks.{i}", x)
            y = (self.call or self.call_block)(i, y)
            x = hooks.leave(f"blocks.{i}", y)
            del y
            x = hooks.post_forward(i, x)
        if cfg.loss.kind == "cross_entropy":
            loss = self._head_loss(self._norm(x, "norm"), self.rows)
        elif cfg.loss.kind == "no_upcast":
            loss = self._no_upcast_loss(self._norm(x, "norm"))
        elif cfg.loss.kind == "in_place":
            loss = self._in_place_loss(self._norm(x, "norm"))
        else:
            loss = self._chunked_loss(self._norm(x, "norm"))
        del x  # forward's local variable: alive until the loss is there
        return hooks.post_forward(-1, hooks.leave("", loss))

    def _logits(self, x: Tensor, rows: int) -> Tensor:
        if not self.cfg.model.tied_head:
            return self.linears(x, "head", "logits", rows)
        x = self.hooks.enter("head", x)
        return self.hooks.leave("head", self.ops.linear(x, self.p["embedding.weight"], None, rows, "logits"))

    def _in_place_loss(self, x: Tensor) -> Tensor:
        return in_place_cross_entropy(self.ops, self._logits(x, self.rows), self.rows)

    def _no_upcast_loss(self, x: Tensor) -> Tensor:
        return cross_entropy_without_upcast(self.ops, self._logits(x, self.rows), self.rows)

    def _head_loss(self, x: Tensor, rows: int, keep_logits: bool = False) -> Tensor:
        """Logits, their fp32 copy, the loss. ``keep_logits``: a local variable holds the logits to the end."""
        logits = self._logits(x, rows)
        if keep_logits:
            return cross_entropy(self.ops, self.ops.cast(logits, FP32, "logits, fp32"))
        logits = self.ops.cast(logits, FP32, "logits, fp32")
        return cross_entropy(self.ops, logits)

    def _chunked_loss(self, x: Tensor) -> Tensor:
        """lab.model.loss: chunks of ceil(rows / num_chunks) tokens, each checkpointed, their losses summed."""
        ops, hidden = self.ops, self.cfg.model.hidden_size
        size = -(-self.rows // self.cfg.loss.num_chunks)
        counts = [min(size, self.rows - start) for start in range(0, self.rows, size)]
        total = ops.new(1, FP32, "loss sum")
        split = ops.split(x, [c * hidden for c in counts], "chunk gradients")
        for chunk, count in zip(split, counts, strict=True):
            part = checkpoint(ops, partial(self._head_loss, rows=count, keep_logits=True), chunk, selective=False)
            total = ops.add(total, part, "loss sum")
            del part
        return ops.scale(total, "loss")
