"""The size of a checkpoint, and the time of writing it beside that of `dd`, on one rank under ZeRO-3.

python -m tools.benchmarks.checkpoints --folder /data/scratch --output tools/benchmarks/results/checkpoints.json

Writes of both forms and of dd (the same bytes, with fsync) take turns in one folder. The student is a stack of linear
layers, all trainable, in float32; its export is one safetensors file. The clock gives seconds of this machine, so
compare the ratios to dd of the same round.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from safetensors.torch import save_file
from torch import nn

from medalign import distributed
from medalign.checkpoint.retention import Retention
from medalign.checkpoint.saving import CheckpointWriter
from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.engine import engine as door
from medalign.engine.engine import Engine
from medalign.engine.settings import deepspeed_settings
from medalign.engine.universal import to_universal

WIDTH = 1024


def _engine(layers: int) -> Engine:
    """Return an engine that has taken one step, so that the optimizer has its state."""
    config = Config()
    config.engine.deepspeed, config.train.precision = "zero3", "fp32"
    config.train.batch_size = config.train.micro_batch_size = 1
    settings = deepspeed_settings(config, 1)
    door.start(settings)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)])
    engine = Engine(model, [{"name": "all", "params": list(model.parameters()), "lr": 1e-3}], settings)
    engine.backward(engine(torch.randn(1, WIDTH, device=engine.device)).square().mean())
    engine.step({"all": 1e-3})
    return engine


def _timed(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _dd(path: Path, size: int) -> None:
    words = ["dd", "if=/dev/zero", f"of={path}", "bs=1M", f"count={size >> 20}", "conv=fsync"]
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)  # noqa: S603
    path.unlink()


def _round(engine: Engine, folder: Path) -> dict[str, float]:
    def gather() -> Callable[[Path], None]:
        whole = engine.gather_parameters(list(engine.student.named_parameters()))

        def export(target: Path) -> None:
            target.mkdir()
            save_file(whole, target / "weights.safetensors")

        return export

    state = TrainState(step=1, samples=0, ranks=1)
    writer = CheckpointWriter(engine, folder / "checkpoints", Retention(1), "", gather)
    found: dict[str, float] = {}
    os.sync()
    found["waiting"] = _timed(lambda: writer.save(state))
    saved = writer.save(state)
    found["bytes"] = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    shutil.rmtree(folder / "checkpoints")
    os.sync()
    began = time.perf_counter()
    found["copy"] = _timed(lambda: writer.begin(state))
    while not writer.is_written():
        time.sleep(0.005)
    found["complete"] = _timed(writer.finish)
    found["in_background"] = time.perf_counter() - began
    found["conversion"] = _timed(lambda: to_universal(saved, folder / "universal", nullcontext))
    shutil.rmtree(folder / "universal")
    shutil.rmtree(folder / "checkpoints")
    os.sync()
    found["dd"] = _timed(lambda: _dd(folder / "dd", int(found["bytes"])))
    return found


def main(folder: Path, output: Path, layers: int = 18, rounds: int = 7) -> None:
    """Measure.

    Args:
        folder: on the disk to measure.
        output: the result file (JSON).
        layers: number of layers of 2**20 parameters.
        rounds: repetitions; the first is not counted.
    """
    distributed.adopt_launcher()
    engine = _engine(layers)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        found = [_round(engine, Path(name)) for _ in range(rounds + 1)][1:]
    door.stop()

    def ratio(*parts: str) -> dict[str, float]:
        values = sorted(sum(row[part] for part in parts) / row["dd"] for row in found)
        named = {"median": statistics.median(values), "least": values[0], "most": values[-1]}
        return {name: round(value, 2) for name, value in named.items()}

    result = {
        "command": f"python -m tools.benchmarks.checkpoints --layers {layers} --rounds {rounds}",
        "trainable_parameters": layers * WIDTH**2,
        "mib": round(found[0]["bytes"] / 2**20, 1),
        "bytes_per_trainable_parameter": round(found[0]["bytes"] / (layers * WIDTH**2), 3),
        "seconds_of_dd": round(statistics.median(row["dd"] for row in found), 3),
        "conversion_mib_per_second": round(
            statistics.median(row["bytes"] / row["conversion"] for row in found) / 2**20, 1
        ),
        "times_dd": {
            "asynchronous false: the run waits": ratio("waiting"),
            "asynchronous true: the run waits": ratio("copy", "complete"),
            "asynchronous true: of which for the copy": ratio("copy"),
            "asynchronous true: until it is complete": ratio("in_background"),
        },
    }
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
