"""``MemoryCallback``: a ``transformers.Trainer`` (or TRL) run measured and predicted like a run of the lab.

    from lab.integrations import MemoryCallback
    trainer = Trainer(..., callbacks=[MemoryCallback()])

Phases, from the Trainer's own events (transformers 5.17 to 5.23, trainer.py, _run_epoch):

==============  ============================================================================================
forward         on_step_begin (on_substep_end) to Accelerator.backward
backward        that call; with DeepSpeed, which steps inside it, the optimizer's step too
optimizer_step  from there after the last micro-batch, so clipping counts to it, to on_optimizer_step
zero_grad       to on_step_end
==============  ============================================================================================
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lab.integrations.reporting import first_in_line, memory_logs
from lab.integrations.run import TrainerRun
from lab.vocab import StepPhase


class MemoryCallback:
    """Measures every rank, predicts, logs both, and leaves a record that `lab compare` and `lab validate` read.

    ``name`` and ``output_dir``: the record goes to ``<output_dir>/<name>/<run id>/record.json``. ``seq_len``: tokens
    per sequence; None: as the first batch has it. ``release_first_bucket``: under DDP on GPUs wait 1 s, once, after the
    first step, so that what is reserved does not hang on the timing of NCCL's watchdog (parallel.ddp, lab's own); False
    leaves the training as it is. A failure of the lab's never stops the training: it is printed, and nothing more is
    measured.
    """

    def __init__(
        self,
        name: str = "hf_trainer",
        output_dir: str = "outputs",
        seq_len: int | None = None,
        release_first_bucket: bool = True,
    ) -> None:
        self.name, self.output_dir, self.seq_len = name, output_dir, seq_len
        self.release_first_bucket = release_first_bucket
        self.run: TrainerRun | None = None
        self._patches = ExitStack()
        atexit.register(self._abandoned)

    def __getattr__(self, event: str) -> Callable[..., None]:
        """Events that nothing is done for."""
        if event.startswith("on_"):
            return lambda *_, **__: None
        raise AttributeError(event)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()
        replaced = first_in_line(self)  # so that what on_log adds reaches every reporter
        self._guarded(self._start, args, state, kwargs, replaced)

    def _start(self, args: Any, state: Any, kwargs: dict[str, Any], replaced: tuple[str, ...]) -> None:
        from lab.parallel.accelerate_engine import watched_backward

        wanted = (self.seq_len, self.release_first_bucket)
        run = self.run = TrainerRun(self.name, self.output_dir, args, state.max_steps, kwargs["model"], *wanted)
        run.replaced = replaced
        run.start(kwargs["optimizer"])
        hook = kwargs["model"].register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._patches.callback(hook.remove)
        self._patches.enter_context(watched_backward(self._backward_begins, self._backward_ends))

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.run is not None and self.run.phases.in_step:
            self._guarded(self.run.saw_batch, kwargs)

    def _backward_begins(self) -> None:
        self._to(StepPhase.BACKWARD)

    def _backward_ends(self, last_micro_batch: bool) -> None:
        self._to(StepPhase.OPTIMIZER_STEP if last_micro_batch else None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None:
            self._guarded(self.run.begin_step)
            self._to(StepPhase.FORWARD)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._to(StepPhase.FORWARD)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._to(StepPhase.ZERO_GRAD)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None:
            self._guarded(self.run.end_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.run is None or logs is None:
            return
        if "loss" in logs:
            self.run.note_loss(state.global_step, float(logs["loss"]))
            added = memory_logs(self.run.newest_step, self.run.prediction)
            logs.update(added)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(added)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None:
            self._guarded(self.run.finish)
        self._close()

    def _abandoned(self) -> None:
        """The process ends in the middle of a training, with an error that the Trainer tells no callback of."""
        if self.run is not None:
            self._guarded(self.run.abandon, getattr(sys, "last_value", None))

    def _to(self, phase: StepPhase | None) -> None:
        if self.run is not None:
            self._guarded(self.run.phases.to, phase)

    def _guarded(self, work: Callable[..., Any], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            print(f"lab: MemoryCallback stops: {type(error).__name__}: {error}", file=sys.stderr)
            self._close()

    def _close(self) -> None:
        self._patches.close()
        if self.run is not None:
            self.run.close()
            self.run = None
