"""Benchmarks that run in processes of their own, one per rank of torch.distributed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def launch(module: str, words: Sequence[str], world: int) -> list[dict[str, Any]]:
    """Run `python -m MODULE --rank WORDS` once per rank on this machine.

    Returns:
        The JSON object in the last line that each rank prints, in the order of the ranks.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", module, "--rank", *words]
    ranks = [
        subprocess.Popen(  # noqa: S603
            command, cwd=ROOT, env=common | {"RANK": str(i), "LOCAL_RANK": str(i)}, stdout=subprocess.PIPE, text=True
        )
        for i in range(world)
    ]
    return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


def process_start() -> float:
    """Return the time at which this process was started, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
