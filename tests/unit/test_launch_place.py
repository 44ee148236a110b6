"""Where a process stands: torchrun's environment, what a machine refuses, sharing through the store."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist

from lab.config import ConfigError, RunConfig, load
from lab.launch import Place, find_place, share_pids, share_run_id

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "LAB_RUN_ID"):
        monkeypatch.setenv(name, "")  # so that what find_place sets is gone after the test
        monkeypatch.delenv(name)


def on_gpu(cfg: RunConfig) -> RunConfig:
    return dataclasses.replace(cfg, hardware=dataclasses.replace(cfg.hardware, device_type="cuda", name="some"))


def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return load(["hardware=cpu", "parallel=ddp"])


def test_torchrun_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_place(under_torchrun(monkeypatch)) == Place(3, 1, torch.device("cpu"))


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert find_place(load(["hardware=cpu", "parallel=zero2"])) == Place(0, 0, torch.device("cpu"))
    assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed asks for it"


def test_several_ranks_need_one() -> None:
    with pytest.raises(ConfigError, match="world_size=2: start it with torchrun --standalone --nproc-per-node 2"):
        find_place(load(["hardware=cpu", "parallel=ddp", "world_size=2"]))


def test_gpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = on_gpu(under_torchrun(monkeypatch))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="hardware=some: PyTorch sees no GPU here"):
        find_place(cfg)


def test_more_ranks_than_gpus_is_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = on_gpu(under_torchrun(monkeypatch))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(ConfigError, match="world_size=4: 2 ranks on a node that has 1 GPUs"):
            find_place(cfg)


def test_all_ranks_share_rank_0s_run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    run_id = share_run_id(store, 0)
    assert share_run_id(store, 1) == share_run_id(store, 5) == run_id
    assert share_run_id(None, 0) != share_run_id(None, 0)
    monkeypatch.setenv("LAB_RUN_ID", "given")
    assert share_run_id(None, 0) == "given"


def test_process_ids_of_the_same_node_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, store = under_torchrun(monkeypatch), dist.HashStore()
    store.set("lab/pid/0", "1000")  # node 0: ranks 0 and 1; this is rank 3, with rank 2 on node 1
    store.set("lab/pid/2", "1002")
    assert share_pids(store, cfg, Place(3, 1, torch.device("cpu"))) == {2: 1002}
    assert int(store.get("lab/pid/3")) == os.getpid()
    assert share_pids(None, cfg, Place(0, 0, torch.device("cpu"))) == {}


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_environments_allocator_is_the_configurations(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the prediction would be one of another allocator; refused before the GPU is looked at."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "max_split_size_mb:64, expandable_segments:True")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = on_gpu(under_torchrun(monkeypatch))
    with pytest.raises(ConfigError, match="expandable_segments=false: true, which the environment asks for"):
        find_place(cfg)
    expandable = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, expandable_segments=True))
    with pytest.raises(ConfigError, match="PyTorch sees no GPU"):
        find_place(expandable)
