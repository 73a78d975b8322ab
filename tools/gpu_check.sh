#!/usr/bin/env bash
# What has to be seen on a GPU, in under ten minutes after the installation: see tools/benchmarks/gpu_check, which does it.
# Takes the environment that it is started in if that has all packages (PYTHON chooses the interpreter), else makes .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
if ! "$python" -m tools.benchmarks.gpu_check --missing; then
    trap 'echo "gpu_check: .venv could not be made. Without internet, start this in an environment with the packages that are named above." >&2' EXIT
    source tools/install.sh
    trap - EXIT
    python=python
fi
exec "$python" -m tools.benchmarks.gpu_check "$@"
