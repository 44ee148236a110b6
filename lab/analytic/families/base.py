"""What transformers' decoders share: positions, mask checks, the loop over blocks, head and loss."""

from __future__ import annotations

from functools import partial
from typing import Any

from lab.analytic.attention import autocast_attention, contiguous
from lab.analytic.attention_masked import masked_attention
from lab.analytic.checkpoint import checkpoint
from lab.analytic.decoder import Decoder
from lab.analytic.families.eager import eager_attention
from lab.analytic.families.inventory import PREFIX, blocks_prefix, buffers, embedding_module
from lab.analytic.families.masks import Masks, as_numbers, bool_mask
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

    def _padding(self) -> Tensor | None:
        """_preprocess_mask_arguments: the caller's mask as bools; without one, whether sequences are packed.

        That (find_packed_sequence_indices) asks whether the positions are those of one sequence; nothing stays.
        """
        ops, s, b = self.ops, self.cfg.train.seq_len, self.cfg.train.micro_batch_size
        joined = ops.new(b * (s + 1), INT64, "position differences")
        difference = ops.new(b * s, INT64, "position differences")
        del joined
        unequal = ops.new(b * s, BOOL, "position jumps")
        packed = ops.new(b * s, INT64, "packed sequence indices")
        ops.scratch(b * s * INT64, "packed sequence indices")  # CUDA's cumsum takes the bools as int64
        del unequal, difference, packed
        return None

    def _is_all_ones(self, padding: Tensor) -> None:
        """masking_utils.fast_all, where the mask may be left out."""

    def _mask(self, size: int, sliding: bool = False) -> Tensor | None:
        """create_causal_mask or create_sliding_window_causal_mask, for hidden states of this element size.

        None for SDPA, which is told that it is causal, unless the window is shorter than the sequence or as long
        (_ignore_causal_mask_sdpa).
        """
        padding = self._padding()
        eager = self.backend is AttentionBackend.EAGER
        if not eager and not (sliding and self.windowed):
            if padding is not None:
                self._is_all_ones(padding)
            return None
        allowed = [bool_mask(self.ops, self.shape, sliding, padding)]
        return as_numbers(self.ops, self.shape, allowed, size) if eager else allowed.pop()

    @property
    def windowed(self) -> bool:
        """Is there a sliding window that a sequence fills?"""
        window = self.cfg.model.hf.sliding_window
        return window is not None and self.cfg.train.seq_len >= window

    def _backend_with(self, mask: Tensor | None) -> AttentionBackend:
        """The kernel of a layer that is given this mask."""
        return self.backend if mask is None or self.backend is AttentionBackend.EAGER else self.masked_backend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gpt2: bool) -> tuple[Tensor, Tensor | None]:
        """attention_interface(...): the output and, from eager attention, the weights."""
        dropout, backend = self.cfg.model.dropout, self._backend_with(mask)
        if mask is not None and backend is AttentionBackend.EAGER:
            return eager_attention(self.ops, q, k, v, mask, self.shape, dropout, gpt2)
        if mask is not None:
            return masked_attention(self.ops, q, k, v, self.shape, backend, dropout), None
        y = autocast_attention(self.ops, q, k, v, self.shape, backend, dropout)
        return contiguous(self.ops, y, self.shape, backend), None

    def _hf_blocks(self, first: list[Tensor], masks: Masks, *extra: Tensor | None) -> Tensor:
        """All blocks over the one tensor in ``first``, which is taken out: the loop's own variable holds it.

        One of the masks and ``extra`` (position ids, rotary tables) reach the blocks as keyword arguments.
        """
        hooks, prefix = self.hooks, blocks_prefix(self.cfg.model)
        x = first.pop()
        for i in range(self.cfg.model.num_layers):
            mask = masks.sliding if self.cfg.model.hf.slides(i) else masks.full
            run = partial(self.layer, i, mask, *extra)
            x = hooks.wrap_input(i, x)
            hooks.pre_forward(i)
            y = hooks.enter(f"{prefix}.{i}", x)
            y = checkpoint(self.ops, run, y, selective=False) if self.checkpointed(i) else run(y)
            x = hooks.leave(f"{prefix}.{i}", y)
            del y
            x = hooks.post_forward(i, x)
        return x

    def layer(self, i: int, *arguments: Any) -> Tensor:
        """Block i: its mask, the extras, then its input."""
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
