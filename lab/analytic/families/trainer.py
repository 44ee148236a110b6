"""Hugging Face models as transformers.Trainer calls them: outputs kept, logits upcast, the loss over counted items.

Source: transformers 5.23 trainer.py (compute_loss, training_step), loss/loss_utils.py (fixed_cross_entropy),
masking_utils.py (_preprocess_mask_arguments, _ignore_causal_mask_sdpa); accelerate utils/operations.py
(convert_outputs_to_fp32, around the model's forward in mixed precision).
"""

from __future__ import annotations

from lab.analytic.accumulator import Accumulator
from lab.analytic.families.base import HFDecoder
from lab.analytic.families.gpt2 import GPT2
from lab.analytic.families.inventory import PREFIX, embedding_module
from lab.analytic.families.llama import Llama
from lab.analytic.families.pieces import causal_lm_loss
from lab.analytic.tape import BOOL, FP32, INT64, Tensor
from lab.vocab import MemoryCategory


class TrainerDecoder(HFDecoder):
    """compute_loss: ``outputs = model(**inputs)``, of which the loss is returned and the rest dropped."""

    begun = False  # a forward has run

    def _padding(self) -> Tensor | None:
        """A mask without padding is made bool each time that a mask is asked for; without one, as everywhere."""
        if not self.cfg.engine.attention_mask:
            return super()._padding()
        return self.ops.new(self.rows, BOOL, "attention mask, bool")

    def _is_all_ones(self, padding: Tensor) -> None:
        """It is, and is dropped."""
        total = self.ops.new(1, INT64, "sum of the mask")
        self.ops.new(self.rows, INT64, "attention mask, int64")
        self.ops.new(1, BOOL, "mask without padding")
        del total

    def _embedding(self, name: str, rows: int, indices: Tensor | None = None) -> Tensor:
        x = super()._embedding(name, rows, indices)
        scales = self.cfg.model.family == "gemma"  # in the embedding's own forward: see TrainerLlama
        return x if scales or name != embedding_module(self.cfg.model) else self._as_leaf(x)

    def _as_leaf(self, x: Tensor) -> Tensor:
        """enable_input_require_grads makes the embedding's output a leaf; the graph keeps it and its gradient."""
        if x.node is not None or not self.cfg.engine.input_gradients:
            return x
        leaf, tape = x.view(node=Accumulator("input embeddings")), self.ops.tape
        accumulator = leaf.node
        assert isinstance(accumulator, Accumulator)

        def hold(_: str) -> None:
            assert accumulator.grad is not None
            accumulator.grad.storage.move(MemoryCategory.ACTIVATIONS)  # no parameter's
            tape.held_by_graph += [x, accumulator.grad]
            accumulator.grad = accumulator.on_grad = None

        accumulator.on_grad = hold
        return self.hooks.leaf(embedding_module(self.cfg.model), leaf)

    def forward(self) -> Tensor:
        ops, hooks, name = self.ops, self.hooks, PREFIX[:-1]
        hooks.pre_forward(-1)
        hooks.enter_source("")
        hooks.enter_source(name)
        x = self.model()
        logits = self._hf_logits(x)
        loss = causal_lm_loss(ops, logits, self.cfg.train.micro_batch_size, self.rows, counted=True)
        loss = hooks.leave(name, loss)
        del x
        loss = hooks.post_forward(-1, hooks.leave("", loss))
        if ops.amp is not None:
            ops.cast_cache = {}  # Accelerate's autocast is inside (prepare_model)
            logits = ops.cast(logits, FP32, "logits of the outputs, fp32")
        if self._copied_by_ddp():
            copies = ops.scale(loss, "DDP's copy of the loss"), ops.scale(logits, "DDP's copy of the logits")
            loss = copies[0]
            del copies
        del logits
        return loss

    def _copied_by_ddp(self) -> bool:
        """DDP that looks for unused parameters clones every output (torch/nn/parallel/distributed.py, _DDPSink).

        With a static graph, which it finds in the first backward, none but the first forward's.
        """
        first, self.begun = not self.begun, True
        return first if self.cfg.parallel.ddp.static_graph else self.cfg.ddp_finds_unused


class TrainerLlama(TrainerDecoder, Llama):
    """Llama and its kin."""

    def _embed(self) -> Tensor:
        """Gemma's embedding scales what it has looked up (GemmaTextScaledWordEmbedding)."""
        x = super()._embed()
        return self._as_leaf(x) if self.cfg.model.family == "gemma" else x


class TrainerGPT2(TrainerDecoder, GPT2):
    """GPT-2."""
