"""The time and the memory of decoding methods relative to greedy decoding.

    python -m tools.benchmarks.decoding_interventions --output tools/benchmarks/results/decoding_interventions.json
    python -m tools.benchmarks.decoding_interventions --students llava --output decoding_gpu.json    # on a GPU

All methods answer the same batch in turns, with the same number of new tokens. A ratio is that of the medians. On a CPU,
the time is that of the processor, on one thread, which other load disturbs little. Random questions; no answer ends
early. Memory is the peak on the GPU during a generation, without the weights.

- phantom: the packaged student, 64 image tokens.
- wide: 576 image tokens, width 512, 6 blocks, random weights.
- llava: random weights of LLaVA-Med's shape.
"""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

from medalign import distributed
from medalign.config import StudentConfig
from medalign.contracts import Batch
from medalign.decoding.base import Decoding
from medalign.decoding.methods.opera import OPERA
from medalign.decoding.methods.pai import PAI
from medalign.decoding.methods.vhr import VHR
from medalign.student.model import Student
from tools.benchmarks.step import models
from tools.benchmarks.step.models import LLAVA, Text
from tools.benchmarks.step.utilization import card_name

METHODS: dict[str, Decoding] = {
    "greedy": Decoding(),
    "pai, gamma 1": Decoding(method=PAI(gamma=1.0)),
    "pai": Decoding(method=PAI()),
    "vhr": Decoding(method=VHR()),
    "5 beams": Decoding(num_beams=5),
    "opera": Decoding(method=OPERA()),
}
MAKERS: dict[str, Callable[[StudentConfig, torch.device, torch.dtype], Student]] = {
    "phantom": models.packaged_student,
    "wide": models.wide_student,
    "llava": lambda config, device, dtype: models.random_student(LLAVA, config, device, dtype),
}


def main(
    output: Path,
    students: list[Literal["phantom", "wide", "llava"]] | None = None,
    samples: int = 2,
    new_tokens: int = 24,
    rounds: int = 5,
) -> None:
    """Measure all methods and write the result.

    Args:
        output: JSON file to write.
        students: phantom and wide by default.
        samples: questions in the batch.
        new_tokens: tokens of each answer.
        rounds: how often each method answers the batch, after once without measuring.
    """
    chosen = students or ["phantom", "wide"]
    torch.manual_seed(0)
    result = {
        "command": shlex.join(["python", "-m", "tools.benchmarks.decoding_interventions", *sys.argv[1:]]),
        "machine": f"{card_name(distributed.device())}, {platform.machine()}, {torch.get_num_threads()} threads",
        "samples": samples,
        "new_tokens": new_tokens,
        "students": {name: _measure(name, samples, new_tokens, rounds) for name in chosen},
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def _measure(name: str, samples: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    device = distributed.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    blocks = LLAVA.blocks if name == "llava" else 4
    config = models.settings(samples, "cpu", layer=models.tapped_layer(blocks)).student
    student = MAKERS[name](config, device, dtype).eval()
    student.spec.model.generation_config.eos_token_id = None  # no answer ends early
    batch = models.make_batch(student, 0, samples, Text(question=24, answer=0)).to(device)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    peaks = dict.fromkeys(METHODS, 0)
    for turn in range(rounds + 1):
        for method, decoding in METHODS.items():
            found, peak = _timed(student, batch, replace(decoding, max_new_tokens=new_tokens))
            if turn:
                seconds[method].append(found)
                peaks[method] = max(peaks[method], peak)
    medians = {method: statistics.median(found) for method, found in seconds.items()}
    rows = {method: {"seconds": value, "over_greedy": value / medians["greedy"]} for method, value in medians.items()}
    for method, row in rows.items():
        if peaks[method]:
            row |= {"peak_gib": peaks[method] / 2**30, "peak_over_greedy": peaks[method] / peaks["greedy"]}
    return {"image_tokens": student.spec.image.count, "dtype": str(dtype).removeprefix("torch."), "methods": rows}


def _timed(student: Student, batch: Batch, decoding: Decoding) -> tuple[float, int]:
    """Answer a batch; return the seconds, and the peak memory in bytes on a GPU, otherwise 0."""
    on_gpu = batch.input_ids.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    clock = time.perf_counter if on_gpu else time.process_time
    began = clock()
    ids, _ = decoding.method.generate(student, batch, decoding, pad_token_id=0, eos_token_id=None)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = clock() - began
    assert ids.shape[1] == decoding.max_new_tokens
    return seconds, torch.cuda.max_memory_allocated() - before if on_gpu else 0


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
