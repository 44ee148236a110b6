"""What training loops keep on the device besides the model: batches, counted items, losses."""

from __future__ import annotations

from lab.analytic.tape import BOOL, FP32, INT64, Tape, Tensor
from lab.config import RunConfig
from lab.vocab import MemoryCategory


def batches_and_losses(cfg: RunConfig, tape: Tape) -> list[Tensor]:
    """The lab's two pairs of tokens and targets and its losses; or the Trainer's batches as a CPU's tracker sees them.

    Accelerate's loader is one batch ahead, on the host: so it counts there. The Trainer's sum of losses appears once
    something is added to it (``Replay.step``).
    """
    t, loss = cfg.train, MemoryCategory.LOGITS_AND_LOSS
    if cfg.engine.kind != "hf_trainer":
        kept = [_batch(cfg, tape) for _ in range(4)]
        return [*kept, tape.new(t.steps, FP32, "losses", loss)]
    kept = [_batch(cfg, tape) for _ in range(cfg.engine.batch_tensors * (t.gradient_accumulation_steps + 1))]
    return [*kept, tape.new(1, FP32, "number of items", loss)]


def load_trainer_batches(cfg: RunConfig, tape: Tape) -> list[Tensor]:
    """Before each step: the batches of all its micro-steps, then how many labels they have; last step's go after that.

    Source: transformers 5.17 and 5.23, trainer.py, get_batch_samples and _get_num_items_in_batch: a sum of bool is one
    of its int64 copy (aten/native/ReduceOps.cpp).
    """
    t, category = cfg.train, MemoryCategory.LOGITS_AND_LOSS
    out = [_batch(cfg, tape) for _ in range(cfg.engine.batch_tensors * t.gradient_accumulation_steps)]
    items: Tensor | None = None
    for _ in range(t.gradient_accumulation_steps):
        labels = t.micro_batch_size * (t.seq_len - 1)
        counted = tape.new(labels, BOOL, "labels that count", category)
        found = tape.new(1, INT64, "number of items", category)
        tape.new(labels, INT64, "labels that count, int64", category)
        del counted
        items = tape.new(1, INT64, "number of items", category)
        del found
    assert items is not None
    return [*out, items]


def _batch(cfg: RunConfig, tape: Tape) -> Tensor:
    return tape.new(cfg.train.micro_batch_size * cfg.train.seq_len, INT64, "batch", MemoryCategory.ACTIVATIONS)
