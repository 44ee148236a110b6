"""One rule per strategy: what is sharded, what is gathered, which buffers live when."""

from __future__ import annotations

from lab.analytic.sharding.accelerate import ACCELERATE_RULES
from lab.analytic.sharding.base import Rule
from lab.analytic.sharding.fsdp import FSDP
from lab.analytic.sharding.hf_trainer import TRAINER_RULES
from lab.analytic.sharding.replicated import DDP, Single
from lab.analytic.sharding.zero import Zero1, Zero2
from lab.analytic.sharding.zero3 import Zero3
from lab.config import ConfigError, RunConfig
from lab.vocab import Strategy

RULES: dict[Strategy, type[Rule]] = {
    Strategy.SINGLE: Single,
    Strategy.DDP: DDP,
    Strategy.ZERO1: Zero1,
    Strategy.ZERO2: Zero2,
    Strategy.ZERO3: Zero3,
    Strategy.FSDP: FSDP,
    Strategy.FSDP_GRAD_OP: FSDP,
    Strategy.HSDP: FSDP,
}


def rule_of(cfg: RunConfig) -> type[Rule]:
    """The rule of a run's strategy under its engine. Raises ConfigError where there is none."""
    rules = {"accelerate": ACCELERATE_RULES, "hf_trainer": TRAINER_RULES}.get(cfg.engine.kind, RULES)
    if cfg.engine.kind == "hf_trainer" and cfg.model.family == "lab":
        raise ConfigError("model", cfg.model.name, "a Trainer's model is one of transformers': model=hf")
    strategy = Strategy.SINGLE if cfg.is_unwrapped_ddp else cfg.parallel.strategy
    if strategy not in rules:
        known = ", ".join(s.value for s in rules)
        raise ConfigError("parallel", strategy.value, f"not modelled with engine={cfg.engine.kind}, which has {known}")
    return rules[strategy]
