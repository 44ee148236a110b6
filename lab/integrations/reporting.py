"""What goes to wherever the Trainer reports to: keys added to its own logs."""

from __future__ import annotations

import inspect
from typing import Any

from lab.record import Prediction, StepMeasurement
from lab.units import to_gib

PREFIX = "memory/"


def first_in_line(callback: Any) -> None:
    """Put ``callback`` before the Trainer's reporters, which were there first and would not see what it adds to a log.

    A callback is given no handle to the list it is in; the handler that calls its events is some frames up.
    """
    frame = inspect.currentframe()
    while frame is not None:
        line = getattr(frame.f_locals.get("self"), "callbacks", None)
        if isinstance(line, list) and any(entry is callback for entry in line):
            # The handler is at this entry now: the ones after it keep their places.
            line.remove(callback)
            line.insert(0, callback)
            return
        frame = frame.f_back


def memory_logs(step: StepMeasurement | None, prediction: Prediction | None) -> dict[str, float]:
    """This rank's newest step and the prediction of the worst rank, in GiB."""
    logs: dict[str, float] = {}
    expected = prediction.steady if prediction else None
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
        if step is not None and step.peak_bytes():
            logs["error_percent"] = 100.0 * (expected.allocated_bytes / step.peak_bytes() - 1.0)
    return {f"{PREFIX}{key}": value for key, value in logs.items()}
