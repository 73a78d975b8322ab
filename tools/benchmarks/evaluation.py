"""Throughput of `medalign evaluate` on one and two ranks of this machine, in turn.

    python -m tools.benchmarks.evaluation --output tools/benchmarks/results/evaluation_ranks.json

The student is the packaged one, untrained, on phantoms. Only the answering is timed, not the start. Each rank has one
thread. On a machine with other work, only the ratio means something.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPETITIONS = 3


def worker(words: list[str]) -> None:
    """Evaluate as one rank, and write the seconds of the answering to stdout."""
    from medalign.cli.main import main

    evaluator: Any = importlib.import_module("medalign.evaluator")
    whole = evaluator.answer_all

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        found = whole(*arguments)
        sys.stderr.write(f"SECONDS {time.perf_counter() - began}\n")
        return found

    evaluator.answer_all = timed
    sys.exit(main(words))


def measure(run: Path, data: Path, ranks: int, batch_size: int) -> float:
    """Return the seconds that the slowest rank takes for all samples."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["evaluate", str(run), "--data", str(data), "--name", f"ranks-{ranks}", "--batch-size", str(batch_size)]
    common = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tools.benchmarks.evaluation", "--worker", *words],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    seconds = []
    for process in processes:
        shown = process.communicate()[1]
        if process.returncode:
            raise SystemExit(shown)
        seconds += [float(line.split()[1]) for line in shown.splitlines() if line.startswith("SECONDS")]
    return max(seconds)


def main() -> None:
    """Measure one and two ranks in turn, and write the result."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--films", type=int, default=40, help="films; each has about five samples")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    medalign = [sys.executable, "-m", "medalign"]
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        subprocess.run(
            [*medalign, "phantom", "--output", data, "--train", "1", "--val", str(options.films)], check=True
        )
        words = [f"--data.train={data}/train", f"--run.dir={run}", "--train.steps=0", "--engine.deepspeed=cpu"]
        subprocess.run([*medalign, "train", "phantom", *words], check=True)
        load = round(os.getloadavg()[2], 1)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(REPETITIONS):
            for ranks, found in seconds.items():
                found.append(measure(run, data / "val", ranks, options.batch_size))
        scores = json.loads((run / "evaluation" / "ranks-2" / "scores.json").read_text())
        answers = [(run / f"evaluation/ranks-{ranks}/predictions.jsonl").read_bytes() for ranks in seconds]
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    result = {
        "command": f"python -m tools.benchmarks.evaluation --films {options.films} --batch-size {options.batch_size}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per rank",
        "load_before": load,  # processes that wanted a core, on average, before the first measurement
        "samples": scores["n"],
        "samples_per_second": {str(ranks): scores["n"] / statistics.median(found) for ranks, found in seconds.items()},
        "speedup_of_two_ranks": {"median": statistics.median(ratios), "all": ratios},
        "same_predictions": answers[0] == answers[1],
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
