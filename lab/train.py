"""One rank of one run: ``torchrun --standalone --nproc-per-node N -m lab.train [overrides]``.

Prediction first, then the measured training, then both side by side in ``record.json``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from lab.config import ConfigError, RunConfig, load

if TYPE_CHECKING:  # torch is imported once the configuration is known to be good
    from lab.launch import Place
    from lab.record import RankMeasurement
    from lab.run_state import RunState


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: trained; 2: the configuration is wrong, in one line from rank 0; else ``lab.faults`` ends it."""
    overrides = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(load(overrides), ["-m", "lab.train", *overrides])
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"lab: {error}", file=sys.stderr)
        return 2


def run(cfg: RunConfig, command: list[str]) -> int:
    """Train as ``cfg`` says and leave a record. ConfigError: refused by this machine, and nothing was written."""
    if cfg.train.expandable_segments:  # read once, when PyTorch's allocator is first asked
        given = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        os.environ["PYTORCH_ALLOC_CONF"] = ",".join([*([given] if given else []), "expandable_segments:True"])
    import torch

    from lab.data import make_batches
    from lab.faults import FaultHandler
    from lab.launch import (
        close_process_group,
        find_place,
        limit_memory,
        open_process_group,
        open_store,
        share_pids,
        share_run_id,
        wait_for_turn,
    )
    from lab.model.hf import check_hf_model
    from lab.report.table import run_table
    from lab.run_state import RunState
    from lab.track import RunFolder
    from lab.transforms.attention_probe import check_attention
    from lab.transforms.quantization import check_compute_dtype, check_storage_dtype
    from lab.vocab import RunStatus

    if cfg.engine.kind == "hf_trainer":
        raise ConfigError("engine", "hf_trainer", "measured in your own Trainer by lab.integrations.MemoryCallback")
    wait_for_turn(lambda: get_ready(cfg))
    check_hf_model(cfg)
    place = find_place(cfg)
    limit_memory(cfg, place.device)
    check_attention(cfg, place.device)
    check_compute_dtype(cfg, place.device)
    check_storage_dtype(cfg)
    make_batches(cfg, torch.device("meta"), place.rank)  # the corpus is there and large enough
    state = RunState(cfg, command, place.rank, place.local_rank)
    faults = FaultHandler(state)
    try:
        store = open_store(cfg)
        state.folder = RunFolder.create(cfg, share_run_id(store, place.rank), place.rank)
        if place.rank == 0:
            predict_first(state)
        state.peers = share_pids(store, cfg, place)
        open_process_group(cfg, place, store)
        ranks, step_seconds = train_and_measure(state, place)
        close_process_group()
        faults.disarm()
        if ranks is not None:
            record = state.record(RunStatus.OK, ranks, step_seconds=step_seconds)
            state.finish(record)
            print(f"\n{run_table([record])}\n\nrecord: {state.folder.record_path}")
    except BaseException as error:
        faults.fail(error)
    return 0


def get_ready(cfg: RunConfig) -> None:
    """What takes seconds and touches no GPU: imports, and the corpus tokenized and cached."""
    import torch

    from lab.data import make_batches
    from lab.parallel import import_engine

    for module in ("lab.build", "lab.loop", "lab.measure", "lab.analytic"):
        import_module(module)
    import_engine(cfg)
    if cfg.adapter.kind != "none" or cfg.model.family != "lab":
        # Most of peft's import. Not peft itself: it imports bitsandbytes, which makes a CUDA context.
        with suppress(ImportError):  # the run says what is missing
            import_module("transformers.modeling_utils")
    make_batches(cfg, torch.device("meta"), int(os.environ.get("RANK", "0")))


def predict_first(state: RunState) -> None:
    """prediction.json before anything is trained: it cannot be tuned to the outcome, and an OOM still leaves it.

    A formula that fails costs the prediction, with a note in the record, not the measurement. ConfigError: what only
    the sizes of a rank's tensors show to be wrong.
    """
    assert state.folder is not None
    try:
        from lab.analytic import predict

        state.prediction = predict(state.cfg)
        state.folder.write_prediction(state.prediction)
    except ConfigError:
        raise
    except Exception as error:
        state.notes.append(f"no prediction: {type(error).__name__}: {error}")
        print(state.notes[-1], file=sys.stderr)


def train_and_measure(state: RunState, place: Place) -> tuple[list[RankMeasurement] | None, float | None]:
    """Build, train, gather: every rank's measurement (on rank 0) and the wall's mean seconds per steady step."""
    from lab.build import build
    from lab.data import make_batches
    from lab.launch import check_allocator
    from lab.loop import Losses, live_tensors, train
    from lab.measure import gather, make_meter
    from lab.measure.device_use import count_kept_memory
    from lab.parallel.saving import save_trained_adapter
    from lab.progress import Progress
    from lab.track import make_tracker
    from lab.transforms.bnb_optimizers import managed_bytes, paged_notes

    cfg, device, folder = state.cfg, place.device, state.folder
    assert folder is not None
    state.tracker = make_tracker(cfg, folder, place.rank)
    meter = state.meter = make_meter(cfg, device, place.rank, place.local_rank, place.gpu_uses_before)
    meter.snapshot_dir = folder.path
    meter.on_step = state.step_done
    meter.start()
    batches = make_batches(cfg, device, place.rank)
    losses = state.losses = Losses(cfg.train.steps, device)
    engine = build(cfg, device)
    check_allocator(cfg, device)
    meter.set_live_tensors(lambda: live_tensors(engine, batches, losses), engine.unseen_allocations)
    meter.build_done()

    state.num_parameters = engine.num_parameters
    state.notes += getattr(engine, "notes", ())
    progress = Progress(cfg, engine.num_parameters, losses, enabled=place.rank == 0)
    clock = train(cfg, engine, batches, meter, losses, progress)
    progress.close()
    losses.read(cfg.train.steps)
    state.notes += paged_notes(cfg.optimizer, device)
    measurement = state.measurement(clock.step_seconds)
    measurement.managed_bytes = managed_bytes(cfg.optimizer, device)
    if measurement.managed_bytes:
        count_kept_memory(measurement)
    meter.stop()
    ranks = gather(measurement, cfg.world_size)
    if cfg.adapter.save:
        save_trained_adapter(engine, folder.path / "adapter")
    engine.close()
    return ranks, clock.step_seconds


if __name__ == "__main__":
    sys.exit(main())
