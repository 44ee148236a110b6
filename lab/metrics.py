"""Speed and learning of a run, from what was measured."""

from __future__ import annotations

import statistics

from lab.config import RunConfig
from lab.config.device import gpu_is_shared
from lab.record import RankMeasurement, RunMetrics


def flops_per_token(cfg: RunConfig, num_parameters: int) -> float:
    """6 N + 12 L h s: model FLOPs of forward and backward per token (PaLM, 2204.02311, appendix B).

    N parameters (all, embedding included), L layers, h = num_heads * head_dim, s tokens per sequence.
    What checkpointing computes again does not count; causal attention counts as full, as PaLM does.
    """
    m = cfg.model
    return 6.0 * num_parameters + 12.0 * m.num_layers * m.num_heads * m.head_dim * cfg.train.seq_len


def utilisation(cfg: RunConfig, num_parameters: int, tokens_per_second: float) -> float | None:
    """Model FLOPs over the dense bf16 peak of all GPUs, 0..1; None on hardware whose peak is not known.

    None beside an adapter too: frozen weights need no weight gradients, so 6 N would count work that is not done.
    """
    if cfg.adapter.kind != "none":
        return None
    peak = cfg.hardware.dense_bf16_flops * cfg.world_size
    return tokens_per_second * flops_per_token(cfg, num_parameters) / peak if peak else None


def run_metrics(
    cfg: RunConfig, num_parameters: int, ranks: list[RankMeasurement], wall_step_seconds: float | None
) -> RunMetrics:
    """Median time of rank 0's steady steps (from the third; measure=off: the wall's mean), mean loss over ranks.

    Steps that the loss scaler skipped are shorter and count only where no steady one was taken.
    """
    steps = [s for s in ranks[0].steps if s.phases] if ranks else []
    steady = [s for s in steps[2:] if not s.skipped] or steps[2:] or steps[-1:]
    step_seconds = statistics.median(s.seconds for s in steady) if steady else wall_step_seconds
    step_seconds = None if gpu_is_shared() else step_seconds
    tokens_per_second = cfg.tokens_per_step / step_seconds if step_seconds else None
    return RunMetrics(
        first_loss=_mean_loss(ranks, 0),
        last_loss=_mean_loss(ranks, min((len(r.steps) for r in ranks), default=0) - 1),
        step_seconds=step_seconds,
        tokens_per_second=tokens_per_second,
        model_flops_utilisation=utilisation(cfg, num_parameters, tokens_per_second) if tokens_per_second else None,
    )


def _mean_loss(ranks: list[RankMeasurement], step: int) -> float | None:
    """Each rank's loss is that of its share of the batch; None where a rank has none."""
    if step < 0 or any(step >= len(r.steps) for r in ranks):
        return None
    losses = [r.steps[step].loss for r in ranks]
    known = [x for x in losses if x is not None]
    return statistics.fmean(known) if known and len(known) == len(losses) else None
