#!/usr/bin/env bash
# Everything that must hold before a change lands: ruff, the type checker, all tests. Makes .venv if it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh
ruff check medalign tests tools setup.py
ruff format --check medalign tests tools setup.py
mypy
exec pytest "$@"
