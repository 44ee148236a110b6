"""Progress of a run on rank 0: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from lab.config import RunConfig
from lab.loop import Losses
from lab.metrics import utilisation

BAR_INTERVAL_S = 1.0  # how often losses are read, each a wait for the device between two steps
LINE_INTERVAL_S = 10.0


class Progress:
    """Call it with each finished step. Other ranks get ``enabled=False`` and print nothing."""

    def __init__(
        self, cfg: RunConfig, num_parameters: int, losses: Losses, enabled: bool, stream: TextIO = sys.stderr
    ) -> None:
        self.cfg, self.num_parameters, self.losses, self.stream = cfg, num_parameters, losses, stream
        self.enabled = enabled
        self._bar: Any = None
        self._shown_at, self._shown_step = time.perf_counter(), 0
        if enabled and stream.isatty():
            self._bar = _make_bar(stream)
            self._task = self._bar.add_task("", total=cfg.train.steps, text="")
            self._bar.start()

    def __call__(self, step: int) -> None:
        if not self.enabled:
            return
        now, finished = time.perf_counter(), step + 1
        interval = BAR_INTERVAL_S if self._bar is not None else LINE_INTERVAL_S
        if now - self._shown_at < interval and finished < self.cfg.train.steps:
            return
        loss = self.losses.read(finished)[-1]
        now = time.perf_counter()  # after the wait: the steps are done now
        tokens = self.cfg.tokens_per_step * (finished - self._shown_step) / max(now - self._shown_at, 1e-9)
        self._shown_at, self._shown_step = now, finished
        self._show(finished, self._text(loss, tokens))

    def _text(self, loss: float, tokens_per_second: float) -> str:
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        used = utilisation(self.cfg, self.num_parameters, tokens_per_second)
        return text if used is None else f"{text}  MFU {100 * used:.1f} %"

    def _show(self, finished: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=finished, text=text, refresh=True)
        else:
            print(f"step {finished}/{self.cfg.train.steps}  {text}", file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _make_bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    # Refreshed by the updates alone: no second thread competes with the loop for the interpreter.
    return Progress(*columns, console=Console(file=stream), auto_refresh=False)
