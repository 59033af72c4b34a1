# A clean virtual environment for the scripts beside this file, which source it; in "$work", gone when they end.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# stage NAME COMMAND...: runs the command and says how long it took.
stage() {
    local name="$1" start="$SECONDS"
    shift
    "$@"
    echo "== $name: $((SECONDS - start)) s"
}

environment() {
    python3 -m venv "$work/venv"
    # shellcheck disable=SC1091
    . "$work/venv/bin/activate"
    # One version of torch, so that a run can be repeated; without a GPU, the CPU build where one is offered.
    # SpikingJelly is the drop-in contract's oracle. Its declared dependencies would replace torch, and its neurons import
    # loguru alone.
    pip install --quiet "torch==${SADP_CI_TORCH:-2.13.0}" loguru pytest-xdist ruff mypy
    pip install --quiet --no-deps spikingjelly==2.0.0
}

# One GPU architecture is enough to show that the CUDA sources compile.
export SADP_CUDA_ARCHITECTURES="${SADP_CUDA_ARCHITECTURES:-90}"

# Threads that spin while they wait make a busy machine with few cores ten times slower.
export OMP_WAIT_POLICY=PASSIVE

# A process for each of two cores. Each takes the next tests when it has none, in files' order; what several tests need
# that takes long, they share (tests/conftest.py).
workers=(-n 2 --dist worksteal)
