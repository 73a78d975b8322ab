"""Every configuration compiles ahead of time, for GPUs that need not be there: tensor cores, no spills, and it fits."""

import json
import os
import subprocess
import sys

import pytest

from medalign.kernels.attention_map import configurations
from medalign.kernels.gpu import ARCHITECTURES

COMPILE = """
import json, sys
from medalign.kernels.attention_map.cases import binaries
from medalign.kernels.triton_compiler import compile_ahead
for binary in binaries(sys.argv[1]):
    print(json.dumps({"name": binary.name, **compile_ahead(binary, sys.argv[1])._asdict()}))
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_compiles(architecture, tmp_path):
    """In a process of its own: here, the kernels are loaded to be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, architecture]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == 4 * 2 * len(configurations.WIDTHS) + 4 + 4 + 1
    card = ARCHITECTURES[architecture]
    for each in compiled:
        # Float32 tiles are smaller than the 64 rows that newer instructions want: mma.sync, which every card has.
        wanted = "mma.sync" if "fp32" in each["name"] else card.tensor_core
        assert wanted in each["tensor_cores"], each
        assert each["stack"] == each["spills"] == 0, each
        assert each["registers"] <= 255 and each["shared_memory"] <= card.shared_memory, each
