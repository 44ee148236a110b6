"""launch/multinode: two torchrun agents, two node ranks on loopback, one run, one record."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lab.track.bundle import read_records
from lab.vocab import RunStatus
from tests.distributed.small_run import ENVIRONMENT, ROOT, small_run

pytestmark = pytest.mark.distributed


def free_port() -> int:
    """One below the range that the system gives to outgoing connections: nothing takes it before node 0 does."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def installed_copy(folder: Path) -> Path:
    """The launch scripts in a folder whose .venv is this interpreter, so that nothing is installed."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy(ROOT / "pyproject.toml", folder)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    stamp = subprocess.run(
        "cksum pyproject.toml launch/setup.sh | tr '\\n' ' '", shell=True, cwd=folder, capture_output=True, check=True
    ).stdout
    (folder / ".venv" / "lab-stamp").write_bytes(stamp + b"\n")
    return folder


def test_two_nodes_are_one_record(tmp_path: Path) -> None:
    folder = installed_copy(tmp_path)
    overrides = [*small_run(tmp_path), "parallel=fsdp", "name=nodes"]
    master = f"127.0.0.1:{free_port()}"

    def node(rank: int) -> subprocess.Popen[str]:
        variables = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER": master, "NPROC": "1"}
        environment = {**ENVIRONMENT, **variables}
        command = [str(folder / "launch" / "multinode"), *overrides]
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    nodes = [node(1), node(0)]  # the order of arrival does not matter
    outputs = [n.communicate(timeout=200)[0] for n in nodes]
    assert [n.returncode for n in nodes] == [0, 0], "\n".join(outputs)
    ((path, record),) = read_records([folder / "outputs" / "nodes"])
    assert record.status is RunStatus.OK
    assert record.config["world_size"] == 2
    assert [(r.rank, r.local_rank, len(r.steps)) for r in record.ranks] == [(0, 0, 3), (1, 0, 3)]
    assert sorted(p.name for p in Path(path).parent.glob("rank_*.jsonl")) == ["rank_0.jsonl", "rank_1.jsonl"]


@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "MASTER"])
def test_a_missing_setting_is_named(tmp_path: Path, missing: str) -> None:
    variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER": "localhost:1"}
    del variables[missing]
    environment = {k: v for k, v in os.environ.items() if k != missing}
    command = [str(ROOT / "launch" / "multinode"), "parallel=ddp"]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert missing in done.stderr
