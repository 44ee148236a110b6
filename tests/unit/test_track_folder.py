"""The run folder, bundles and records of runs that left none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.analytic import predict
from lab.config import ConfigError, RunConfig, load, run_config_from_json
from lab.config import to_json as config_to_json
from lab.record import PhaseReading, RankMeasurement, RunMetrics, RunRecord, StepMeasurement, to_json, write_json_atomic
from lab.track import RunFolder, environment, fault_of, new_run_id, recover_record
from lab.track.bundle import read_records, slim, write_bundle
from lab.vocab import MemoryBreakdown, MemoryCategory, RunStatus, StepPhase


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return load([f"launch.output_dir={tmp_path}", "name=study", "tracker=none", "hardware=cpu", "train.steps=3"])


def step(index: int, peak: int = 1000) -> StepMeasurement:
    ledger = MemoryBreakdown({MemoryCategory.PARAMETERS: 5})
    reading = PhaseReading(end_allocated_bytes=5, peak_allocated_bytes=peak, ledger=ledger, unattributed_bytes=0)
    return StepMeasurement(index, 0.1, None, {StepPhase.FORWARD: reading})


def record_of(cfg: RunConfig, run_id: str, steps: int = 4) -> RunRecord:
    ranks = [
        RankMeasurement(r, r, f"host{r}.example", "cpu", "cpu_storage_tracker", steps=[step(i) for i in range(steps)])
        for r in range(2)
    ]
    return RunRecord(
        run_id,
        cfg.name,
        RunStatus.OK,
        "2025-01-01T00:00:00+00:00",
        ["/somewhere/bin/python3", "-m", "lab.train", "parallel=ddp"],
        config_to_json(cfg),
        {"host": "abc", "python": "3.11"},
        prediction=predict(cfg),
        ranks=ranks,
        metrics=RunMetrics(3.0, 2.0, 0.1, 100.0),
    )


def test_run_ids_are_unique_and_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAB_RUN_ID", raising=False)
    ids = [new_run_id() for _ in range(200)]
    assert len(set(ids)) == 200
    assert [i[:22] for i in ids] == sorted(i[:22] for i in ids)
    monkeypatch.setenv("LAB_RUN_ID", "given")
    assert new_run_id() == "given"


def test_folder_holds_config_prediction_steps_and_record(cfg: RunConfig, tmp_path: Path) -> None:
    folder = RunFolder.create(cfg, "run-1", rank=0)
    RunFolder.create(cfg, "run-1", rank=1)  # another rank: the folder may be there already
    assert folder.path == tmp_path / "study" / "run-1"
    assert "num_layers: 4" in (folder.path / ".hydra" / "config.yaml").read_text()
    assert "- name=study" in (folder.path / ".hydra" / "overrides.yaml").read_text()
    prediction = predict(cfg)
    folder.write_prediction(prediction)
    assert to_json(folder.read_prediction()) == to_json(prediction)
    for index in range(3):
        folder.append_step(1, step(index))
    assert folder.read_steps(1) == [step(0), step(1), step(2)]  # flushed: readable before close
    assert folder.ranks_on_disk() == [1]
    folder.close()
    record = record_of(cfg, "run-1")
    folder.write_record(record)
    assert to_json(folder.read_record()) == to_json(record)
    assert run_config_from_json(record.config) == cfg


def test_other_ranks_do_not_write_the_configuration(cfg: RunConfig) -> None:
    assert not (RunFolder.create(cfg, "run-2", rank=1).path / ".hydra").exists()


def test_a_line_cut_off_by_a_kill_is_left_out(cfg: RunConfig) -> None:
    folder = RunFolder.create(cfg, "run-3")
    folder.append_step(0, step(0))
    folder.close()
    with folder.rank_path(0).open("a") as stream:
        stream.write('{"step": 1, "seco')
    assert folder.read_steps(0) == [step(0)]


def test_a_killed_run_gets_a_record_with_its_finished_steps(cfg: RunConfig) -> None:
    folder = RunFolder.create(cfg, "run-4")
    folder.write_prediction(predict(cfg))
    for rank in range(2):
        folder.append_step(rank, step(0))
        folder.append_step(rank, step(1))
    log = folder.logs_path / "torchrun.log"
    log.parent.mkdir()
    log.write_text("  exitcode   : -9 (pid: 77)\n")
    record = recover_record(folder, cfg, ["torchrun"], "2025-01-01T00:00:00+00:00")
    assert record.status is RunStatus.FAILED
    assert record.error == "a rank was killed by signal 9"
    assert [len(r.steps) for r in record.ranks] == [2, 2]
    assert to_json(record.prediction) == to_json(predict(cfg))
    assert any(r.where == "peak" for r in record.residuals)


def test_the_error_is_the_first_dead_ranks_last_exception(cfg: RunConfig) -> None:
    import os

    folder = RunFolder.create(cfg, "run-5")
    texts = ["Traceback ...\nRuntimeError: Connection closed by peer\n", "ValueError: the cause\nsome later warning\n"]
    for rank, text in enumerate(texts):
        path = folder.logs_path / "attempt_0" / str(rank) / "stderr.log"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        os.utime(path, (2000 - rank * 100, 2000 - rank * 100))  # rank 1 wrote last, earlier
    assert fault_of(folder) == (RunStatus.FAILED, "ValueError: the cause", None)


@pytest.mark.parametrize("known", [None, RunStatus.TIMEOUT])
def test_out_of_memory_wins_over_what_the_starter_saw(cfg: RunConfig, known: RunStatus | None) -> None:
    folder = RunFolder.create(cfg, "run-6")
    word = {"rank": 1, "phase": "forward", "step": 0, "allocated_bytes": 7, "error": "out of memory: 8 B"}
    write_json_atomic(folder.path / "oom_rank_1.json", word)
    record = recover_record(folder, cfg, [], "", known, "no end")
    assert record.status is RunStatus.OOM
    assert (record.oom, record.error) == (word, "rank 1: out of memory: 8 B")


def test_out_of_memory_only_in_the_log(cfg: RunConfig) -> None:
    folder = RunFolder.create(cfg, "run-7")
    path = folder.logs_path / "0" / "stderr.log"
    path.parent.mkdir(parents=True)
    path.write_text("[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    status, error, _ = fault_of(folder)
    assert status is RunStatus.OOM
    assert error is not None
    assert error.startswith("torch.OutOfMemoryError")


def test_a_rank_that_left_word_of_its_failure(cfg: RunConfig) -> None:
    folder = RunFolder.create(cfg, "run-10")
    write_json_atomic(folder.path / "failed_rank_1.json", {"rank": 1, "error": "ValueError: no"})
    assert fault_of(folder) == (RunStatus.FAILED, "rank 1: ValueError: no", None)


def test_a_configuration_that_this_machine_refuses_is_invalid(cfg: RunConfig) -> None:
    folder = RunFolder.create(cfg, "run-11")
    path = folder.logs_path / "0" / "stderr.log"
    path.parent.mkdir(parents=True)
    path.write_text("some warning\nlab: hardware=h200: PyTorch sees no GPU here\n")
    record = recover_record(folder, cfg, [], "")
    assert (record.status, record.error) == (RunStatus.INVALID, "hardware=h200: PyTorch sees no GPU here")


def test_a_time_limit_is_kept_when_nothing_else_is_known(cfg: RunConfig) -> None:
    record = recover_record(RunFolder.create(cfg, "run-8"), cfg, [], "", RunStatus.TIMEOUT, "no end after 5 s")
    assert (record.status, record.error) == (RunStatus.TIMEOUT, "no end after 5 s")


def test_slim_keeps_first_and_steady_step_and_no_host(cfg: RunConfig) -> None:
    slimmed = slim(record_of(cfg, "run-9", steps=6))
    assert [[s.step for s in r.steps] for r in slimmed.ranks] == [[0, 5], [0, 5]]
    assert slimmed.steady_step == 1
    text = json.dumps(slimmed.command) + str(slimmed)
    assert "example" not in text
    assert "/somewhere" not in text
    assert [r.hostname for r in slimmed.ranks] == ["node-0", "node-1"]
    assert slimmed.ranks[0].steps[1].phases[StepPhase.FORWARD].ledger is not None


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz"])
def test_bundles_and_folders_read_the_same(cfg: RunConfig, tmp_path: Path, name: str) -> None:
    for run_id in ("2", "1"):
        folder = RunFolder.create(cfg, run_id)
        folder.append_step(0, step(0))  # rank_0.jsonl beside it is no bundle
        folder.close()
        folder.write_record(record_of(cfg, run_id))
    loose = list(read_records([tmp_path / "study"]))
    assert [r.run_id for _, r in loose] == ["1", "2"]
    bundle = tmp_path / "bundles" / name
    assert write_bundle(bundle, [r for _, r in loose]) == 2
    first = bundle.read_bytes()
    write_bundle(bundle, [r for _, r in reversed(loose)])
    assert bundle.read_bytes() == first  # same records, same bytes
    again = list(read_records([bundle]))
    assert [s for s, _ in again] == [f"{bundle}:1", f"{bundle}:2"]
    assert [to_json(r) for _, r in again] == [to_json(slim(r)) for _, r in loose]


def test_what_is_no_record_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        list(read_records([tmp_path / "nowhere"]))
    (tmp_path / "record.json").write_text('{"schema_version": 999}')
    with pytest.raises(ConfigError, match="schema 999"):
        list(read_records([tmp_path]))


def test_environment_names_versions_and_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("NCCL_BUFFSIZE", "1048576")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    found = environment()
    assert found["versions"]["deepspeed"]
    assert found["variables"]["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["variables"]["NCCL_BUFFSIZE"] == "1048576"
    assert "secret-host" not in json.dumps(found)
