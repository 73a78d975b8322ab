"""The cost of distillation: complete training steps of several forms in one process, on one rank.

    python -m tools.benchmarks.step                     # the packaged student, and a wider one with 576 image tokens
    python -m tools.benchmarks.step --preset phantom --rounds 5
    python -m tools.benchmarks.step --preset llava --output step_gpu.json    # on a GPU, at LLaVA-Med's shapes

Five forms of the same step take turns: plain fine-tuning; both losses, with precomputed targets and with the teacher
running online; and the form of the released code, with precomputed targets and online. `forms.py` describes each form.
The preset `packing` compares padded and packed micro-batches of phantoms.

Writes the command, medians, ratios, and on a GPU memory and utilization, to tools/benchmarks/results/step_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medalign import distributed
from medalign.engine import engine as door
from medalign.engine.settings import precision
from medalign.teacher.loading import load_tower
from tools.benchmarks.step import models
from tools.benchmarks.step.forms import Bench
from tools.benchmarks.step.measuring import assemble, measure, real_shapes
from tools.benchmarks.step.models import LLAVA, TINY, Text
from tools.benchmarks.step.packing import measure_packing
from tools.benchmarks.step.utilization import card_name

ROOT = Path(__file__).resolve().parents[3]
DEFAULT_PRESETS = ("phantom", "wide", "packing")


def packaged(samples: int, options: argparse.Namespace) -> Bench:
    """Build the packaged student and teacher."""
    config = models.settings(samples, options.engine)
    teacher = load_tower(config.teacher, distributed.device(), precision(config))
    return assemble(config, models.packaged_student, teacher, samples, Text())


def phantom(options: argparse.Namespace, _folder: Path) -> dict[str, Any]:
    """Measure the packaged student."""
    return measure(packaged(options.samples or 16, options), options.rounds, "phantom")


def wide(options: argparse.Namespace, _folder: Path) -> dict[str, Any]:
    """Measure a wider student with 576 image tokens."""
    samples = options.samples or 2
    config = models.settings(samples, options.engine)
    teacher = load_tower(config.teacher, distributed.device(), precision(config))
    return measure(assemble(config, models.wide_student, teacher, samples, Text()), options.rounds, "wide")


def packing(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the packaged student with padded and with packed micro-batches."""
    samples = options.samples or 16
    return measure_packing(packaged(samples, options), samples, options.rounds, folder / "phantoms")


def llava(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure random weights at the shapes of LLaVA-Med, or at tiny shapes."""
    shape, samples = TINY if options.preset == ["tiny"] else LLAVA, options.samples or 4
    device = distributed.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return real_shapes(shape, samples, options.rounds, options.engine, folder / "teacher", device, dtype)


PRESETS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "phantom": phantom,
    "wide": wide,
    "packing": packing,
    "llava": llava,
    "tiny": llava,  # the same at sizes that run in seconds on a CPU, for tests
}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, nargs="+", default=list(DEFAULT_PRESETS))
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each form (default %(default)s)")
    parser.add_argument("--samples", type=int, help="samples per step (default: the preset's)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--engine", default="zero2", help="DeepSpeed settings of ds_configs/ (default %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "tools/benchmarks/results/step_cpu.json")
    return parser.parse_args()


def main() -> None:
    """Measure the presets, print the result and write it as JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    distributed.adopt_launcher()
    door.start({})
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for preset in options.preset:
            results[preset] = PRESETS[preset](options, Path(scratch))
    door.stop()
    place = card_name(distributed.device())
    machine = f"{platform.machine()}, {options.threads} threads" if place == "CPU" else place
    facts = {
        "command": shlex.join(["python", "-m", "tools.benchmarks.step", *sys.argv[1:]]),
        "machine": f"{machine}, torch {torch.__version__}",
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(facts | results, indent=2) + "\n")
    print(json.dumps(facts | results, indent=2))


if __name__ == "__main__":
    main()
