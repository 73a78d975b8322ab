#!/usr/bin/env bash
# All checks that a change must pass: ruff, the type checker, all tests. Creates .venv if it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh
ruff check medalign tests tools setup.py
ruff format --check medalign tests tools setup.py
mypy
exec pytest "$@"
