#!/usr/bin/env bash
# Tests and measures everything that needs a GPU, in under ten minutes after the installation (tools/benchmarks/gpu_check).
# Uses the current environment if it has all packages (PYTHON selects the interpreter), otherwise creates .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
if ! "$python" -m tools.benchmarks.gpu_check --missing; then
    trap 'echo "gpu_check: .venv could not be created. Without internet access, run this in an environment that has the packages listed above." >&2' EXIT
    source tools/install.sh
    trap - EXIT
    python=python
fi
exec "$python" -m tools.benchmarks.gpu_check "$@"
