"""Op lists of Hugging Face families beside the lab's own decoder, and which one a run uses."""

from __future__ import annotations

from lab.analytic.decoder import Decoder
from lab.analytic.families.base import make_buffers as make_buffers
from lab.analytic.families.gpt2 import GPT2
from lab.analytic.families.llama import Llama
from lab.analytic.families.trainer import TrainerGPT2, TrainerLlama
from lab.analytic.ops import Ops, Parameter
from lab.analytic.sharding.base import Rule
from lab.config import RunConfig


def make_decoder(cfg: RunConfig, ops: Ops, params: dict[str, Parameter], hooks: Rule) -> Decoder:
    """The op list of the run's family; unknown ones are replayed as a Llama of their shapes."""
    kind = {"lab": Decoder, "gpt2": GPT2}.get(cfg.model.family, Llama)
    if cfg.engine.kind == "hf_trainer":
        kind = TrainerGPT2 if kind is GPT2 else TrainerLlama
    return kind(cfg, ops, params, hooks)
