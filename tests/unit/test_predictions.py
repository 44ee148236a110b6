"""Predictions of many configurations: in order, on several processes or on one, each equal configuration once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lab.analytic import predict
from lab.cli import predictions
from lab.cli.predictions import WORTH_PROCESSES, predicted, predicted_each, predictions_kept
from lab.config import load


def test_on_two_processes_as_on_one() -> None:
    cfg = load(["model=tiny", "hardware=h200", "model.num_layers=1"])
    many = [replace(cfg, train=replace(cfg.train, seq_len=16 * (i + 1))) for i in range(WORTH_PROCESSES)]
    assert predicted_each(many, processes=2) == [predict(c) for c in many]


def test_equal_ones_are_predicted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(["model=tiny", "hardware=h200"])
    longer = replace(cfg, train=replace(cfg.train, seq_len=128))
    asked: list[int] = []
    monkeypatch.setattr(predictions, "predict", lambda c: asked.append(c.train.seq_len) or predict(c))
    with predictions_kept():
        first, second, third = predicted_each([cfg, longer, cfg])
        assert first is third
        assert predicted(longer) is second
    assert asked == [256, 128]
