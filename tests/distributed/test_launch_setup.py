"""launch/setup.sh against a stub python: which interpreter, what is installed in which order, and when nothing is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["setup.sh", "quickstart", "test", "multinode", "slurm.sbatch"]

# Logs what it is asked; $OLD: too old; $TORCH: this interpreter (and venvs that see its packages) has a torch.
STUB = r"""#!/usr/bin/env bash
here="$(cd "$(dirname "$0")" && pwd)"
case "$1 $2" in
  "--version "*) echo "Python 3.9.0" ;;
  "-c "*) [ -z "${OLD:-}" ] ;;
  "- "*) [ -n "${TORCH:-}" ] && { [[ "$here" != *.venv* ]] || [ -e "$here/../system" ]; } ;;
  "-m venv")
    dir="${!#}"
    mkdir -p "$dir/bin" && cp "$0" "$dir/bin/python"
    [ "$3" != --system-site-packages ] || touch "$dir/system"
    echo "venv ${*:3}" >>"$LOG" ;;
  "-m pip") echo "pip ${*: -2}" >>"$LOG" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    return tmp_path


def set_up(checkout: Path, gpu: bool = False, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Source setup.sh as the scripts do: (process, what the stub logged)."""
    log = checkout / "log"
    log.write_text("")
    smi = checkout / "stubs" / "nvidia-smi"
    smi.write_text("#!/usr/bin/env bash\n" + ("echo 'GPU 0: NVIDIA H200'\n" if gpu else "exit 9\n"))
    smi.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"}
    environment |= {"PATH": f"{checkout / 'stubs'}:/usr/bin:/bin", "LOG": str(log), **variables}
    command = ["bash", "-c", 'set -euo pipefail; source "$0/launch/setup.sh"; echo "ready $LAB_PYTHON"', str(checkout)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    return done, log.read_text().splitlines()


def test_without_a_gpu_torch_is_pinned_first(checkout: Path) -> None:
    done, log = set_up(checkout)
    assert log == ["venv .venv", "pip --no-input torch==2.13.0", "pip -e .[dev]"]
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"ready {checkout}/.venv/bin/python\n")


def test_with_a_gpu_one_plain_install(checkout: Path) -> None:
    assert set_up(checkout, gpu=True)[1] == ["venv .venv", "pip -e .[dev]"]


@pytest.mark.parametrize("gpu", [False, True])
def test_an_images_own_torch_is_used(checkout: Path, gpu: bool) -> None:
    assert set_up(checkout, gpu, TORCH="yes")[1] == ["venv --system-site-packages .venv", "pip -e .[dev]"]


def test_the_second_call_installs_nothing_until_something_changed(checkout: Path) -> None:
    set_up(checkout)
    assert set_up(checkout)[1] == []
    with (checkout / "pyproject.toml").open("a") as stream:
        stream.write("# changed\n")
    assert set_up(checkout)[1] == ["pip --no-input torch==2.13.0", "pip -e .[dev]"]  # into the same environment


def test_a_broken_installation_is_made_again(checkout: Path) -> None:
    set_up(checkout)
    (checkout / ".venv" / "bin" / "python").unlink()
    assert len(set_up(checkout)[1]) == 3


def test_an_old_python_is_one_line(checkout: Path) -> None:
    done, log = set_up(checkout, OLD="yes")
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        "needs Python 3.11 or newer; found: Python 3.9.0. Set PYTHON=/path/to/python3.11"
    ]
    assert log == []


def test_scripts_are_complete_and_can_be_called() -> None:
    for name in SCRIPTS:
        path = ROOT / "launch" / name
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        assert os.access(path, os.X_OK) or name == "setup.sh"
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec launch/test"
