"""One Trainer run on one rank: its facts, its meter, its prediction, its record."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lab.config import RunConfig
from lab.faults import is_out_of_memory, one_line, oom_moment
from lab.integrations.phases import PhaseSwitch
from lab.integrations.settings import Facts, Settings, resolved, trainer_settings
from lab.launch import has_expandable_segments
from lab.measure import gather, make_meter
from lab.parallel.accelerate_engine import applied_state
from lab.parallel.engine import optimizer_state_tensors, quantized_tensors
from lab.parallel.replicated import await_watchdog, ddp_allocations, steps_with_first_bucket
from lab.record import Prediction, StepMeasurement, write_json_atomic
from lab.run_state import RunState
from lab.track import RunFolder, new_run_id
from lab.units import MIB
from lab.vocab import MemoryCategory, RunStatus

PROVISIONAL_SEQ_LEN = 1  # until the first batch is seen; nothing that the meter needs depends on it


class TrainerRun:
    """Made when the training begins; ``seq_len`` None: the first batch tells."""

    def __init__(
        self,
        name: str,
        output_dir: str,
        args: Any,
        max_steps: int,
        model: Any,
        seq_len: int | None,
        release_first_bucket: bool = False,
    ) -> None:
        self.name, self.output_dir, self.args, self.model = name, output_dir, args, model
        self.max_steps, self.seq_len, self._release_first_bucket = max_steps, seq_len, release_first_bucket
        self.device = torch.device(args.device)
        self.world_size, self.rank = int(args.world_size), int(args.process_index)
        self.run_id = _shared_run_id(self.rank)
        self.path = Path(output_dir) / name / self.run_id
        self._write_model_config()
        self.replaced: tuple[str, ...] = ()  # the Trainer's methods that a subclass has its own of
        self.lengths: set[int] = set()
        self.steps_begun = 0
        self.losses: dict[int, float] = {}
        self.settings, self.cfg = self._resolve(seq_len or PROVISIONAL_SEQ_LEN)
        self.state = RunState(self.cfg, [Path(sys.argv[0]).name], self.rank, int(args.local_process_index))
        self.state.folder = RunFolder.create(self.cfg, self.run_id, self.rank)
        self.state.num_parameters = sum(p.numel() for p in model.parameters())
        self.meter = self.state.meter = make_meter(self.cfg, self.device, self.rank, self.state.local_rank)
        self.meter.on_step = self._step_done
        self.newest_step: StepMeasurement | None = None
        self.phases = PhaseSwitch(self.meter)
        self._predicted = False
        self._embedded: weakref.ref[Tensor] | None = None
        self._embedding_hook: RemovableHandle | None = None

    # -- configuration -------------------------------------------------------------------------------

    def _write_model_config(self) -> None:
        """The model's config.json into the run folder: what the prediction is made from. Ranks do not wait here."""
        file = self.path / "model" / "config.json"
        if not file.is_file():
            write_json_atomic(file, json.loads(self.model.config.to_json_string(False)))

    def _resolve(self, seq_len: int, batch: dict[str, Tensor] | None = None) -> tuple[Settings, RunConfig]:
        kind, deepspeed, _ = applied_state()
        weights = [p for p in self.model.parameters() if p.is_floating_point()]
        mask = (batch or {}).get("attention_mask")
        facts = Facts(
            device_type=self.device.type,
            world_size=self.world_size,
            max_steps=self.max_steps,
            seq_len=seq_len,
            **({} if batch is None else {"batch_keys": tuple(sorted(batch))}),
            distributed_type=kind,
            deepspeed=deepspeed,
            parameter_dtype=str(weights[0].dtype).removeprefix("torch."),
            attention=str(self.model.config._attn_implementation),
            adapter=_adapter(self.model),
            input_gradients=any(getattr(m, "_require_grads_hooks", None) for m in self.model.modules()),
            quantization=_quantization(self.model),
            padded=mask is not None and not bool(mask.all()),
            release_first_bucket=self._release_first_bucket,
            ddp=_ddp(self.model),
            expandable_segments=has_expandable_segments(self.device),
        )
        path = str(self.path / "model" / "config.json")
        settings = trainer_settings(self.args, facts, path, self.name, self.output_dir)
        return settings, resolved(settings)

    # -- the run -------------------------------------------------------------------------------------

    def start(self, optimizer: Any) -> None:
        self._accelerated = optimizer  # Accelerate's wrapper, which knows whether a step was skipped
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # without it
        self.meter.start()
        wrappers = _wrappers(self.model)
        self.meter.set_live_tensors(self.live_tensors, lambda: (a for w in wrappers for a in ddp_allocations(w)))
        self._embedding_hook = self.model.get_input_embeddings().register_forward_hook(self._note_embedded)
        self.meter.build_done()
        if self.seq_len is not None:
            self._predict()

    def _note_embedded(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self._embedded = weakref.ref(output)

    def live_tensors(self) -> Iterator[tuple[MemoryCategory, Tensor]]:
        """Parameters, gradients, buffers, optimizer states on the device.

        And a frozen embedding's output, with its gradient: enable_input_require_grads makes it a leaf, saved nowhere.
        """
        embedded = self._embedded() if self._embedded is not None else None
        if embedded is not None and embedded.is_leaf:
            yield MemoryCategory.ACTIVATIONS, embedded
            if embedded.grad is not None:
                yield MemoryCategory.ACTIVATIONS, embedded.grad
        yield from quantized_tensors(self.model)
        for buffer in self.model.buffers():
            yield MemoryCategory.ACTIVATIONS, buffer
        if self.cfg.parallel.strategy.zero_stage:
            from lab.parallel.zero import deepspeed_tensors

            yield from deepspeed_tensors(self.model, self.optimizer, self.device)
            return
        for parameter in self.model.parameters():
            yield MemoryCategory.PARAMETERS, parameter.data
            if parameter.grad is not None:
                yield MemoryCategory.GRADIENTS, parameter.grad
        for value in optimizer_state_tensors(self.optimizer, self.device):
            yield MemoryCategory.OPTIMIZER_STATES, value

    def begin_step(self) -> None:
        self.phases.begin_step(self.steps_begun)
        self.steps_begun += 1

    def end_step(self) -> None:
        if getattr(self._accelerated, "step_was_skipped", False):
            self.meter.mark_skipped()
        self.phases.end_step()
        if self.steps_begun == steps_with_first_bucket(self.cfg, self.device):
            await_watchdog(self.device)

    def saw_batch(self, inputs: dict[str, Any]) -> None:
        """Before each forward of a training step: the batch's length, and with the first one the prediction."""
        batch = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.dim() == 2}
        for tensor in batch.values():
            self.meter.claim(MemoryCategory.ACTIVATIONS, tensor)
        tokens = batch.get("input_ids")
        if tokens is not None:
            self.lengths.add(tokens.shape[1])
            if not self._predicted:
                self.settings, self.cfg = self._resolve(self.seq_len or tokens.shape[1], batch)
                self.state.cfg = self.cfg
                if tokens.shape[0] != self.cfg.train.micro_batch_size:
                    self.settings.assumed.append(f"the first batch has {tokens.shape[0]} sequences")
                self._predict()

    def _predict(self) -> None:
        """prediction.json before the first forward; what keeps it from being made becomes a note of the record."""
        self._predicted = True
        self.settings.assumed += [f"{method} holds no more than transformers' own" for method in self.replaced]
        assert self.state.folder is not None
        self.state.notes += [f"assumed: {text}" for text in self.settings.assumed]
        if self.rank == 0:
            self.state.folder.write_config(self.cfg)
        if self.settings.missing:
            self.state.notes += [f"no prediction: {text}" for text in self.settings.missing]
            return
        from lab.analytic import predict

        try:
            self.state.prediction = predict(self.cfg)
        except Exception as error:  # a formula that fails costs the prediction, not the measurement
            self.state.notes.append(f"no prediction: {type(error).__name__}: {error}")
            return
        self.state.prediction.assumptions += self.settings.assumed
        if self.rank == 0:
            self.state.folder.write_prediction(self.state.prediction)

    @property
    def prediction(self) -> Prediction | None:
        return self.state.prediction

    def note_loss(self, global_step: int, loss: float) -> None:
        """The Trainer's logged loss: the mean since it logged last."""
        self.losses[global_step - 1] = loss

    def _step_done(self, step: StepMeasurement) -> None:
        self.newest_step = step
        self.state.step_done(step)

    def finish(self) -> None:
        """Every rank's measurement to rank 0, which writes the record."""
        self.phases.end_step()
        measurement = self.meter.measurement()
        self.meter.stop()
        for step in measurement.steps:
            step.loss = self.losses.get(step.step)
        if len(self.lengths) > 1:
            shortest, longest = min(self.lengths), max(self.lengths)
            self.state.notes.append(
                f"sequences of {shortest} to {longest} tokens; predicted at {self.cfg.train.seq_len}"
            )
        ranks = gather(measurement, self.world_size)
        if ranks is not None:
            record = self.state.record(RunStatus.OK, ranks)
            self.state.finish(record)
            assert self.state.folder is not None
            print(f"lab: memory record: {self.state.folder.record_path}")

    def abandon(self, error: BaseException | None) -> None:
        """A record of a run that did not end well: what the ranks left on disk, and of this one what is known."""
        if self.rank:
            return
        status, oom, text = RunStatus.INTERRUPTED, None, "the process ended before the training did"
        if error is not None:
            status, text = RunStatus.FAILED, one_line(error)
            if is_out_of_memory(error):
                status, oom = RunStatus.OOM, {"rank": self.rank, **oom_moment(self.meter, error)}
        self.state.finish(self.state.record(status, self.state.known_ranks(), text, oom), limited=True)

    def close(self) -> None:
        if self._embedding_hook is not None:
            self._embedding_hook.remove()
        self.phases.end_step()
        self.meter.stop()


def _wrappers(model: Any) -> list[DistributedDataParallel]:
    """DDP around the model, if any: the Trainer keeps it to itself."""
    return [o for o in gc.get_objects() if type(o) is DistributedDataParallel and o.module is model]


def _ddp(model: Any) -> dict[str, Any]:
    """What DDP was told, under its own names."""
    return {
        name: value
        for wrapper in _wrappers(model)
        for name, value in (
            ("find_unused_parameters", wrapper.find_unused_parameters),
            ("bucket_cap_mb", wrapper.bucket_bytes_cap / MIB),
            ("broadcast_buffers", wrapper.broadcast_buffers),
            ("static_graph", wrapper.static_graph),
        )
    }


def _adapter(model: Any) -> dict[str, Any] | None:
    """The configuration of a peft model's adapter; of several, none that is modelled."""
    configs = list((getattr(model, "peft_config", None) or {}).values())
    if not configs:
        return None
    return dict(configs[0].to_dict()) if len(configs) == 1 else {"peft_type": f"{len(configs)} adapters"}


def _quantization(model: Any) -> dict[str, Any] | None:
    config = getattr(model.config, "quantization_config", None)
    return None if config is None else dict(config if isinstance(config, dict) else config.to_dict())


_runs = 0


def _shared_run_id(rank: int) -> str:
    """Rank 0's run id on every rank, through the process group's store: no tensor, no clock per rank."""
    global _runs
    _runs += 1
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return new_run_id()
    store = dist.distributed_c10d._get_default_store()
    key = f"lab/trainer_run_id/{_runs}"
    if rank == 0:
        store.set(key, new_run_id())
    return bytes(store.get(key)).decode()
