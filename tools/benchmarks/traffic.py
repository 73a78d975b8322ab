"""The bytes that collectives carry in a step under ZeRO-3, beside the plan, and the time of a step on 1 and 2 ranks.

python -m tools.benchmarks.traffic --output tools/benchmarks/results/traffic.json

Trains the quickstart's student on phantoms, on one rank and on two. Each rank counts the sizes of the tensors of every
collective between two steps, and converts them into the bytes that a rank receives at least: with N ranks (N - 1) / N
of what is gathered or scattered, twice that of what is summed on all ranks. The first steps are left out. The report
also has the parts of the start.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.benchmarks.ranks import launch, process_start

MODULE = "tools.benchmarks.traffic"
STEPS, FIRST = 6, 3  # steps of a run, and the first one that counts
WORDS = ("--train.batch_size=8", "--train.micro_batch_size=4", "--log.wandb=off", "--checkpoint.asynchronous=false")
BYTES: Counter[str] = Counter()


def _size(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def count_collectives(world: int) -> None:
    """Let the functions of torch.distributed count the bytes that a rank receives; before DeepSpeed is imported."""
    import torch.distributed as dist

    part = (world - 1) / world
    received: dict[str, Callable[..., float]] = {
        "all_gather_into_tensor": lambda output, *_: part * _size(output),
        "reduce_scatter_tensor": lambda output, source, *_: part * _size(source),
        "all_gather": lambda outputs, *_: part * sum(map(_size, outputs)),
        "reduce_scatter": lambda output, sources, *_: part * sum(map(_size, sources)),
        "all_reduce": lambda tensor, *_: 2 * part * _size(tensor),
        "broadcast": lambda tensor, *_: part * _size(tensor),
    }
    for name, size in received.items():
        setattr(dist, name, _counting(getattr(dist, name), name, size))


def _counting(real: Callable[..., Any], name: str, size: Callable[..., float]) -> Callable[..., Any]:
    names = inspect.signature(real)

    def call(*args: Any, **kwargs: Any) -> Any:
        BYTES[name] += round(size(*names.bind(*args, **kwargs).arguments.values()))
        return real(*args, **kwargs)

    return call


def measure_rank(words: list[str]) -> dict[str, Any]:
    """Train on this rank, in a process of its own."""
    began = process_start()
    count_collectives(int(os.environ["WORLD_SIZE"]))
    from medalign import config
    from medalign.run import train
    from medalign.training.callbacks import Callback

    marks = {"imports": time.time() - began}
    counted: list[dict[str, int]] = []
    times: list[float] = []

    class Meter(Callback):
        def on_train_start(self, trainer: Any) -> None:
            marks["start"] = time.time() - began

        def on_step_start(self, trainer: Any) -> None:
            BYTES.clear()
            times.append(time.perf_counter())

        def on_step_end(self, trainer: Any) -> None:
            times[-1] = time.perf_counter() - times[-1]
            counted.append(dict(BYTES))
            marks.setdefault("first step", time.time() - began)

    train(config.load("phantom", words), [Meter()])
    total = sum((Counter(row) for row in counted[FIRST:]), Counter())
    return {"bytes": {name: size / (STEPS - FIRST) for name, size in total.items()}} | {
        "seconds": times[FIRST:],
        "marks": marks,
    }


def planned(words: list[str], world: int) -> dict[str, float]:
    """Return the bytes of the plan for the same settings."""
    import torch

    from medalign import config
    from medalign.data.order.order import StepPlan
    from medalign.engine.settings import deepspeed_settings
    from medalign.planning.shapes import student_on_meta
    from medalign.planning.work import traffic

    settings = config.load("phantom", words)
    plan = StepPlan(settings.train.batch_size, settings.train.micro_batch_size, world)
    student = student_on_meta(settings.student, torch.float32)
    recompute = settings.student.gradient_checkpointing
    found = traffic(student, deepspeed_settings(settings, world), world, plan.accumulation, 4, recompute)
    return {"gather": found.gather, "reduce": found.reduce}


def main(output: Path) -> None:
    """Train on one and two ranks, and compare.

    Args:
        output: the result file (JSON).
    """
    from medalign import phantom

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phantom.write_phantoms(folder / "data", 8, 1, 0)
        words = [*WORDS, f"--train.steps={STEPS}", f"--data.train={folder}/data/train"]
        runs = {world: launch(MODULE, [*words, f"--run.dir={folder}/run-{world}"], world) for world in (1, 2)}
        plan = planned(words, 2)
    found = Counter(runs[2][0]["bytes"])  # means over the steps: what is fetched ahead may belong to the next one
    kinds = {
        "gather": found["all_gather_into_tensor"],  # all_gather carries small objects, not weights
        "reduce": found["reduce_scatter_tensor"] + found["reduce_scatter"],
    }
    result = {
        "command": "python -m tools.benchmarks.traffic",
        "settings": " ".join([*WORDS, f"--train.steps={STEPS}"]),
        "bytes_received_per_step_and_rank": {
            kind: {"measured": round(size), "planned": round(plan[kind]), "ratio": round(size / plan[kind], 3)}
            for kind, size in kinds.items()
        },
        "other_bytes": round(sum(found.values()) - sum(kinds.values())),
        "step_seconds_by_ranks": {
            world: round(statistics.median(ranks[0]["seconds"]), 3) for world, ranks in runs.items()
        },
        "seconds_since_launch_by_ranks": {
            world: {what: round(value, 1) for what, value in ranks[0]["marks"].items()} for world, ranks in runs.items()
        },
    }
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        print(json.dumps(measure_rank(sys.argv[2:])))
    else:
        from jsonargparse import auto_cli

        auto_cli(main, as_positional=False)
