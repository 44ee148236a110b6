"""What goes to wherever the Trainer reports to: keys added to its own logs."""

from __future__ import annotations

import inspect
from typing import Any

from lab.record import Prediction, StepMeasurement
from lab.units import to_gib

PREFIX = "memory/"
_DECIDING = ("compute_loss", "training_step", "create_optimizer")


def first_in_line(callback: Any) -> tuple[str, ...]:
    """Put ``callback`` before the Trainer's reporters, which were there first and would not see what it adds to a log.

    A callback is given no handle to the list it is in, nor to the Trainer; both are some frames up. Returns the names
    of the Trainer's own methods that a subclass (TRL's, say) has replaced and that decide what lives in a step.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        line = getattr(owner, "callbacks", None)
        if isinstance(line, list) and any(entry is callback for entry in line):
            # The handler is at this entry now: the ones after it keep their places.
            line.remove(callback)
            line.insert(0, callback)
        if hasattr(owner, "callback_handler") and hasattr(owner, "training_step"):
            kind = type(owner)
            return tuple(f"{kind.__name__}.{name}" for name in _DECIDING if not _is_trainers(getattr(kind, name, None)))
        frame = frame.f_back
    return ()


def _is_trainers(method: Any) -> bool:
    return method is None or getattr(method, "__module__", "") == "transformers.trainer"


def memory_logs(step: StepMeasurement | None, prediction: Prediction | None) -> dict[str, float]:
    """This rank's newest step and the prediction of the worst rank (the first step's for the first), in GiB."""
    logs: dict[str, float] = {}
    first = step is not None and step.step == 0
    expected = (prediction.first_step if first else prediction.steady) if prediction else None
    if step is not None and step.phases:
        logs["measured_peak_gib"] = to_gib(step.peak_bytes())
        logs["measured_reserved_gib"] = to_gib(step.peak_bytes("peak_reserved_bytes"))
        for phase, reading in step.phases.items():
            logs[f"measured_{phase.value}_peak_gib"] = to_gib(reading.peak_allocated_bytes)
    if expected is not None:
        logs["predicted_peak_gib"] = to_gib(expected.allocated_bytes)
        logs["predicted_reserved_gib"] = to_gib(expected.reserved_bytes)
        for phase, moments in expected.phases.items():
            logs[f"predicted_{phase.value}_peak_gib"] = to_gib(moments.peak.total_bytes)
        if step is not None and step.peak_bytes() and not step.skipped:
            logs["error_percent"] = 100.0 * (expected.allocated_bytes / step.peak_bytes() - 1.0)
    return {f"{PREFIX}{key}": value for key, value in logs.items()}
