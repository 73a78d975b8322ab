# shellcheck shell=bash
# Sourced by the other scripts: creates or updates .venv with the tested versions and activates it.
# PYTHON selects the interpreter (3.11 to 3.13).
set -e  # an installation that failed must not look finished
venv=.venv
stamp=$venv/.installed
if [ ! -x $venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv $venv
fi
if ! cat setup.py tools/constraints.txt | cmp -s - $stamp; then
    echo "installing medalign into $venv (first time: a few minutes and about 6 GB)" >&2
    # torch first: DeepSpeed's setup imports it
    $venv/bin/pip install -q -c tools/constraints.txt torch torchvision
    $venv/bin/pip install -q -c tools/constraints.txt -e '.[dev]'
    cat setup.py tools/constraints.txt > $stamp
fi
export PATH="$PWD/$venv/bin:$PATH"
# Without an NVIDIA GPU, DeepSpeed needs an explicit choice of the CPU.
if [ -z "${DS_ACCELERATOR:-}" ] && ! nvidia-smi -L > /dev/null 2>&1; then
    export DS_ACCELERATOR=cpu
fi
