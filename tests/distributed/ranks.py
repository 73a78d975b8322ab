"""Starts real ranks on this machine, one process per rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds; a hang becomes a failure


def start(arguments: list[str], world: int, **variables: str) -> list[subprocess.Popen]:
    """Start `python ARGUMENTS` once per rank, with the variables that a launcher sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """Wait for all processes and return their output. Fail with the output if one failed or timed out."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=TIMEOUT)[0])
    finally:
        for process in processes:
            process.kill()
    tails = "\n\n".join(f"--- rank {rank}\n{output[-3000:]}" for rank, output in enumerate(outputs))
    assert all(process.returncode == 0 for process in processes), tails
    return outputs


def run_worker(worker: str, settings: dict[str, Any], world: int, folder: Path, module: str = "workers") -> list[Any]:
    """Call the function `worker` of a module in this folder on each rank; return the results (JSON)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    finish(start(["-m", f"tests.distributed.{module}", worker, str(folder)], world))
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world)]
