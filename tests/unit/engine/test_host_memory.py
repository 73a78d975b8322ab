"""Memory of freed tensors is returned although small ones between them stay."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from medalign.engine.host_memory import freed_at_once


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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is the C library of Linux")
def test_freed_tensors_are_returned_to_the_system():
    with freed_at_once():
        pass
    assert left(nullcontext()) > 200  # as without it, the holes stay
    assert left(freed_at_once()) < 32 + 20
