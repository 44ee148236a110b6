"""What transformers' decoders share: positions, mask checks, the loop over blocks, head and loss."""

from __future__ import annotations

from functools import partial
from typing import Any

from lab.analytic.attention import autocast_attention, contiguous
from lab.analytic.checkpoint import checkpoint
from lab.analytic.decoder import Decoder
from lab.analytic.families.eager import eager_attention, make_mask
from lab.analytic.families.inventory import PREFIX, blocks_prefix, buffers, embedding_module
from lab.analytic.families.pieces import causal_lm_loss
from lab.analytic.tape import BOOL, INT64, Grads, Node, Tape, Tensor
from lab.config import RunConfig
from lab.vocab import AttentionBackend, Checkpointing, MemoryCategory

LEAF = 1 << 62  # sequence number of gradient accumulators, which run as soon as they are ready


class HFDecoder(Decoder):
    """``XForCausalLM.forward`` behind lab.model.hf.HFCausalLM. Subclasses give the model's own forward.

    Modules that are called with keyword arguments alone (the model, self_attn) get no hook on their input: DeepSpeed
    looks at positional arguments only.
    """

    def _require_gradient(self, embedded: Tensor) -> Tensor:
        """transformers' gradient checkpointing makes the embedding's output require one (enable_input_require_grads).

        With a frozen embedding it is a leaf then: it and its gradient stay as long as the graph, until the loss goes.
        """
        if embedded.node is not None or self.cfg.checkpointing.kind is Checkpointing.NONE:
            return embedded
        held = self.ops.tape.held_by_graph

        def accumulate(grads: Grads) -> Grads:
            assert grads[0] is not None
            held.append(grads[0].view())
            return []

        embedded.node = Node(self.ops.tape, [], accumulate)
        embedded.node.seq = LEAF
        held.append(embedded.view())
        return self.hooks.leaf(embedding_module(self.cfg.model), embedded)

    def _positions(self) -> Tensor:
        """torch.arange(s) + 0."""
        plain = self.ops.new(self.cfg.train.seq_len, INT64, "position ids")
        positions = self.ops.new(self.cfg.train.seq_len, INT64, "position ids")
        del plain
        return positions

    def _check_packed(self) -> None:
        """masking_utils.find_packed_sequence_indices: are the positions those of one sequence? Nothing stays."""
        ops, s, b = self.ops, self.cfg.train.seq_len, self.cfg.train.micro_batch_size
        joined = ops.new(b * (s + 1), INT64, "position differences")
        difference = ops.new(b * s, INT64, "position differences")
        del joined
        unequal = ops.new(b * s, BOOL, "position jumps")
        packed = ops.new(b * s, INT64, "packed sequence indices")
        ops.scratch(b * s * INT64, "packed sequence indices")  # CUDA's cumsum takes the bools as int64
        del unequal, difference, packed

    def _mask(self, size: int) -> Tensor | None:
        """masking_utils.create_causal_mask: None for SDPA, which is told that it is causal."""
        self._check_packed()
        return make_mask(self.ops, self.shape, size) if self.backend is AttentionBackend.EAGER else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gpt2: bool) -> tuple[Tensor, Tensor | None]:
        """attention_interface(...): the output and, from eager attention, the weights."""
        dropout = self.cfg.model.dropout
        if mask is not None:
            return eager_attention(self.ops, q, k, v, mask, self.shape, dropout, gpt2)
        y = autocast_attention(self.ops, q, k, v, self.shape, self.backend, dropout)
        return contiguous(self.ops, y, self.shape, self.backend), None

    def _hf_blocks(self, first: list[Tensor], *extra: Tensor | None) -> Tensor:
        """All blocks over the one tensor in ``first``, which is taken out: the loop's own variable holds it.

        ``extra`` (position ids, mask, rotary tables) reach the blocks as keyword arguments.
        """
        hooks, prefix = self.hooks, blocks_prefix(self.cfg.model)
        x = first.pop()
        for i in range(self.cfg.model.num_layers):
            run = partial(self.layer, i, *extra)
            x = hooks.wrap_input(i, x)
            hooks.pre_forward(i)
            y = hooks.enter(f"{prefix}.{i}", x)
            y = checkpoint(self.ops, run, y, selective=False) if self.checkpointed(i) else run(y)
            x = hooks.leave(f"{prefix}.{i}", y)
            del y
            x = hooks.post_forward(i, x)
        return x

    def layer(self, i: int, *arguments: Any) -> Tensor:
        """Block i: the extras, then its input."""
        raise NotImplementedError

    def model(self) -> Tensor:
        """The model under the head: the final norm's output."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        hooks, name = self.hooks, PREFIX[:-1]
        hooks.pre_forward(-1)
        hooks.enter_source("")
        hooks.enter_source(name)
        x = self.model()
        logits = self._hf_logits(x)
        loss = causal_lm_loss(self.ops, logits, self.cfg.train.micro_batch_size, self.rows)
        loss = hooks.leave(name, loss)
        del x, logits  # forward's local variables
        return hooks.post_forward(-1, hooks.leave("", loss))

    def _hf_logits(self, x: Tensor) -> Tensor:
        head = f"{PREFIX}lm_head"
        if not self.cfg.model.tied_head:
            return self.linears(x, head, "logits", self.rows)
        x = self.hooks.enter(head, x)
        weight = self.p[f"{embedding_module(self.cfg.model)}.weight"]
        return self.hooks.leave(head, self.ops.linear(x, weight, None, self.rows, "logits"))


def make_buffers(cfg: RunConfig, tape: Tape) -> list[Tensor]:
    """Buffers that live with the model (lab.model.hf.materialise_buffers)."""
    return [tape.new(numel, size, label, MemoryCategory.ACTIVATIONS) for label, numel, size in buffers(cfg)]
