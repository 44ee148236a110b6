"""predict(RunConfig) -> Prediction."""

from __future__ import annotations

from lab.config import RunConfig
from lab.record import Moment, PhasePrediction, Prediction, StepPrediction
from lab.vocab import STEP_PHASES, MemoryBreakdown, MemoryCategory


def predict(cfg: RunConfig) -> Prediction:
    """Placeholder while the analytic model is being written: interface only."""
    states = MemoryBreakdown({MemoryCategory.PARAMETERS: 4})
    moment = Moment(4, states)
    step = StepPrediction(4, 4, 4, states, {p: PhasePrediction(moment, moment) for p in STEP_PHASES})
    return Prediction(step, step, states, 1, [])
