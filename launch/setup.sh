# shellcheck shell=bash
# Sourced by the scripts beside it: goes to the repository's root, makes .venv there and installs the lab into it.
#
# Needs Python 3.11 or newer and, the first time, a package index that pip can reach. Afterwards nothing is
# downloaded until pyproject.toml changes. PYTHON=/path/to/python chooses the interpreter.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
LAB_PYTHON="$PWD/.venv/bin/python"

# The first interpreter that is new enough; PYTHON wins.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "needs Python 3.11 or newer; found: $(python3 --version 2>&1 || true). Set PYTHON=/path/to/python3.11" >&2
  return 1
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# Whether interpreter $1 has a torch in pyproject.toml's range that imports and, on a GPU machine, sees the GPU.
has_torch() {
  "$1" - "$(has_gpu && echo gpu)" 2>/dev/null <<'PYTHON'
import re, sys
from importlib.metadata import version
release = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", version("torch")).groups())
if not (2, 11) <= release < (2, 14):
    sys.exit(1)
import torch
sys.exit(sys.argv[1] == "gpu" and not torch.cuda.is_available())
PYTHON
}

# Makes .venv unless it is there and works.
make_venv() {
  local python
  if "$LAB_PYTHON" -c 'import pip' 2>/dev/null; then
    return
  fi
  rm -rf .venv
  python="$(find_python)"
  # A container image may bring its own torch: use that one instead of downloading another.
  if has_torch "$python"; then
    "$python" -m venv --system-site-packages .venv
    has_torch "$LAB_PYTHON" || rm -rf .venv # it was in another virtual environment
  fi
  if [ ! -d .venv ] && ! "$python" -m venv .venv; then
    echo "cannot make a virtual environment with $python; on Debian and Ubuntu: apt install python3-venv" >&2
    rm -rf .venv
    return 1
  fi
}

install() {
  local pip_install
  echo "installing into .venv (a minute or two) ..."
  make_venv
  pip_install=("$LAB_PYTHON" -m pip install --quiet --quiet --disable-pip-version-check --no-input)
  # Without a GPU pin torch first: a looser request may bring gigabytes of CUDA libraries.
  if ! has_gpu && ! has_torch "$LAB_PYTHON"; then
    "${pip_install[@]}" torch==2.13.0
  fi
  "${pip_install[@]}" -e '.[dev]'
}

# What the installation was made from; written last, so that a broken one is made again.
lab_stamp() { cksum pyproject.toml launch/setup.sh | tr '\n' ' '; }

set_up() {
  if [ "$(cat .venv/lab-stamp 2>/dev/null || true)" = "$(lab_stamp)" ] && "$LAB_PYTHON" -c '' 2>/dev/null; then
    return
  fi
  install
  lab_stamp >.venv/lab-stamp
}

# One installation at a time: nodes may share this folder.
if command -v flock >/dev/null; then
  exec {lab_lock}<pyproject.toml
  flock "$lab_lock"
  set_up
  exec {lab_lock}>&-
else
  set_up
fi
