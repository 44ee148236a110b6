"""`lab sweep` over real torchruns: a run that trains, one that runs out of memory, and `lab compare` of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.track.bundle import read_records
from lab.vocab import RunStatus, StepPhase
from tests.distributed.small_run import lab, small_run

pytestmark = pytest.mark.distributed
TOO_LARGE = 2**31 - 1


def test_points_train_run_out_of_memory_and_are_compared(tmp_path: Path) -> None:
    # 16384 x (2^31 - 1) fp32 elements are 2^47 bytes, all of a process's address space: no machine grants that.
    shape = ["model.hidden_size=16384", "model.num_heads=1", "model.head_dim=2", "model.vocab_size=400"]
    sizes = f"model.intermediate_size=32,{TOO_LARGE}"
    study = ["parallel=zero1", "world_size=2", "name=study", *shape, sizes]
    arguments = ["sweep", *study, *small_run(tmp_path)]
    done = lab(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = {r.config["model"]["intermediate_size"]: r for _, r in read_records([tmp_path / "outputs"])}
    assert {size: r.status for size, r in records.items()} == {32: RunStatus.OK, TOO_LARGE: RunStatus.OOM}
    trained, refused = records[32], records[TOO_LARGE]
    assert [len(r.steps) for r in trained.ranks] == [3, 3]
    assert trained.worst("peak_allocated_bytes", 2) is not None
    assert trained.ranks[0].steps[-1].phases[StepPhase.ZERO_GRAD].ledger
    assert any(r.where == "peak" for r in trained.residuals)
    assert refused.oom is not None
    assert refused.oom["phase"] == "build"
    assert refused.prediction is not None
    logs = list((tmp_path / "outputs").glob("study/*/logs/**/1/stderr.log"))
    assert len(logs) == 2  # rank 1 of either run has logs of its own

    rows = json.loads(lab("compare", "--json", cwd=tmp_path).stdout)
    assert sorted(r["status"] for r in rows) == ["ok", "oom"]
    row = next(r for r in rows if r["status"] == "ok")
    assert row["world_size"] == 2
    assert row["tokens_per_second"] > 0
    assert row["measured_allocated_bytes"] > 0

    again = lab(*arguments, cwd=tmp_path)
    assert again.stdout.startswith("2 points, 2 already recorded\n")
    assert again.returncode == 0
    assert len(list((tmp_path / "outputs" / "study").iterdir())) == 2
