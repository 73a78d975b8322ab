"""Memory of freed tensors is returned although small ones between them stay."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from medalign.engine.host_memory import freed_at_once

ROOT = Path(__file__).parents[3]


def own_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def left(context) -> float:
    """Return the MiB that are left of 256 after they are freed; 32 MiB in small tensors stay between them."""
    before = own_mib()
    with context:
        large, small = [], []
        for _ in range(128):
            large.append(torch.ones(1 << 19))  # 2 MiB
            small.append(torch.ones(1 << 16))
        assert own_mib() - before > 200
        large.clear()
    return own_mib() - before


def measure() -> None:
    """Print what is left inside the context, and after it. The holes that are left after it would be filled inside."""
    inside = left(freed_at_once())
    sys.stdout.write(f"{inside} {left(nullcontext())}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is the C library of Linux")
def test_freed_tensors_are_returned_to_the_system():
    """In a process of its own: the heap of this one has holes, which the tensors would fill."""
    code = "from tests.unit.engine.test_host_memory import measure; measure()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    inside, without = map(float, done.stdout.split())
    assert without > 200  # the holes stay
    assert inside < 32 + 20
