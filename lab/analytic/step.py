"""Replays whole steps of a run: build, then forward, backward, optimizer step, zero_grad; with marks."""

from __future__ import annotations

from lab.analytic.batches import batches_and_losses, load_trainer_batches
from lab.analytic.families import make_buffers, make_decoder
from lab.analytic.inventory import inventory
from lab.analytic.ops import Ops
from lab.analytic.sharding import rule_of
from lab.analytic.tape import FP32, Tape, Tensor, Trace
from lab.analytic.timeline import phase_mark
from lab.config import RunConfig
from lab.vocab import MemoryCategory, Precision, StepPhase


class Replay:
    """One rank of one run, symbolically. ``trace.events`` grows with each step."""

    def __init__(self, cfg: RunConfig, rank: int = 0) -> None:
        self.cfg = cfg
        self.gpu = cfg.hardware.device_type == "cuda"
        self.trace = Trace(cfg.hardware.allocation_alignment_bytes, self.gpu)
        self.tape = Tape(self.trace)
        self.rule = rule_of(cfg)(cfg, self.tape, inventory(cfg))
        self.rule.rank = rank
        self.ops = Ops(
            self.tape,
            linear_keeps_parameter=self.rule.linear_keeps_parameter,
            half_is_fp16=cfg.precision.kind is Precision.FP16_MIXED,
            workspace_bytes=cfg.hardware.cublas_workspace_bytes,
            num_streaming_multiprocessors=cfg.hardware.num_streaming_multiprocessors,
            lt_workspace_bytes=cfg.hardware.cublaslt_workspace_bytes,
        )
        self.kept: list[object] = []
        self.scaler: list[Tensor] = []  # GradScaler's tensors, from its first scale() on
        self.trainer_batches = self.gpu and cfg.engine.kind == "hf_trainer"
        self.batches: list[Tensor] = []  # the Trainer's, of one step
        self.done = 0
        self.last_loss: Tensor | None = None

    def build(self) -> None:
        """Model, engine, batches and the loss record; what the Trainer holds comes after what one gives it."""
        if not self.trainer_batches:
            self.kept += batches_and_losses(self.cfg, self.tape)
            self.kept += make_buffers(self.cfg, self.tape)
        self.rule.build()
        if self.trainer_batches:
            self.kept += make_buffers(self.cfg, self.tape)
            self.kept.append(self.tape.new(1, FP32, "summed loss", MemoryCategory.LOGITS_AND_LOSS))
        self.decoder = make_decoder(self.cfg, self.ops, self.rule.parameters, self.rule)

    def step(self) -> None:
        """One optimizer step."""
        self.rule.start_step()
        if self.trainer_batches:
            self.batches = load_trainer_batches(self.cfg, self.tape)
        accumulation, trainer = self.cfg.train.gradient_accumulation_steps, self.cfg.engine.kind == "hf_trainer"
        inside = trainer and self.rule.deepspeed  # Accelerate's backward takes DeepSpeed's step (utils/deepspeed.py)
        for micro in range(accumulation):
            self.rule.last_micro_step = micro == accumulation - 1
            self._mark(StepPhase.FORWARD, False)
            loss = self._forward()
            self._mark(StepPhase.FORWARD, True)
            self._mark(StepPhase.BACKWARD, False)
            roots = self._scaled(loss)
            self.tape.backward(roots[-1], self.rule.end_backward)
            self.rule.finish_backward()
            if inside and self.rule.last_micro_step:
                self.rule.optimizer_step()
            del roots
            self._mark(StepPhase.BACKWARD, True)
            if trainer and self.rule.last_micro_step:  # MemoryCallback opens the phase inside training_step
                self._mark(StepPhase.OPTIMIZER_STEP, False)
            if trainer:
                self.last_loss = loss.view()  # tr_loss_step, until the next training_step has returned
            del loss  # the loop's variable lives until here, and with it the graph
            self.tape.held_by_graph.clear()
            if trainer and not self.gpu and not self.done and not micro:  # tr_loss + tr_loss_step
                self.kept.append(self.tape.new(1, FP32, "summed loss", MemoryCategory.LOGITS_AND_LOSS))
        if not trainer:
            self._mark(StepPhase.OPTIMIZER_STEP, False)
        if not inside:
            self.rule.optimizer_step()
        self._mark(StepPhase.OPTIMIZER_STEP, True)
        self._mark(StepPhase.ZERO_GRAD, False)
        self.rule.zero_grad()
        self._mark(StepPhase.ZERO_GRAD, True)
        self.done += 1

    def _mark(self, phase: StepPhase, end: bool) -> None:
        self.trace.mark(phase_mark(self.done, phase, end))

    def _scaled(self, loss: Tensor) -> list[Tensor]:
        """The loss over the micro-steps, times the loss scale: backward starts from the last.

        DeepSpeed does both always and keeps the first until its backward returns (engine.py, backward); the Trainer
        tells it to leave out the first (trainer.py, training_step: scale_wrt_gas).
        """
        ops, roots = self.ops, [loss]
        if self.rule.deepspeed:
            if self.cfg.engine.kind != "hf_trainer":
                roots.append(ops.scale(loss, "loss over micro-steps"))
            roots.append(ops.scale(roots[-1], "scaled loss"))
            return roots
        if self.cfg.train.gradient_accumulation_steps > 1 or self.rule.always_divides_loss:
            roots = [ops.scale(loss, "loss over micro-steps")]
        if self.cfg.precision.kind is Precision.FP16_MIXED:
            if not self.scaler:
                self.scaler = [self.tape.new(1, FP32, name) for name in ("loss scale", "growth tracker")]
            roots.append(ops.scale(roots[-1], "scaled loss"))  # what it is made of stays a local variable
        return roots

    def _forward(self) -> Tensor:
        self.ops.amp = self.rule.compute_itemsize if self.rule.autocast else None
        self.ops.cast_cache = {}
        loss = self.decoder.forward()
        self.ops.cast_cache = {}  # autocast ends with the forward pass
        return loss
