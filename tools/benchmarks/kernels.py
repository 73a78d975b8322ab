"""Measures time and memory of the distillation kernels on the CPU: the released code's form against the chunked path.

    python -m tools.benchmarks.kernels            # minutes; writes tools/benchmarks/results/kernels_cpu.json
    python -m tools.benchmarks.kernels --quick    # seconds, at small sizes; writes only with --output

Measures with the package's own benchmark (`medalign bench kernels`), on one thread, with a separate process for each
measurement, so that no path inherits the buffers of another. Every run is forward and backward together. Times are
medians, by the wall clock and by processor time, which on one thread hardly depends on the load of the machine. Extra
memory is the peak of resident memory beyond the inputs in the first run. Measure GPUs with
`medalign bench kernels --device cuda`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from medalign.benchmark.kernels import eager
from medalign.benchmark.kernels.measurement import cpu_times, peak_megabytes, value_and_gradients
from medalign.benchmark.kernels.token_similarity import cases as token_similarity
from medalign.kernels import attention_map

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "tools/benchmarks/results/kernels_cpu.json"
CPU = torch.device("cpu")
SHORT = 5.0  # seconds; measurements that take less run up to ten times the requested repetitions


@dataclass(frozen=True)
class Case:
    """One problem, solved by several paths."""

    name: str
    kind: str  # "similarity" or "attention"
    paths: tuple[str, ...]
    samples: int = 1
    tokens: int = 576
    width: int = 4096
    teacher_width: int = 1024
    heads: int = 32
    key_heads: int = 8
    question: int = 48


FULL = (
    Case("N=576 d=4096 b=1024 B=4", "similarity", ("eager", "chunked"), samples=4),
    Case("N=2304 d=4096 b=1024 B=4", "similarity", ("eager", "chunked"), samples=4, tokens=2304),
    Case("N=9216 d=512 b=512 B=1", "similarity", ("eager", "chunked"), tokens=9216, width=512, teacher_width=512),
    Case("N=18432 d=512 b=512 B=1", "similarity", ("chunked",), tokens=18432, width=512, teacher_width=512),
    Case("attention, 32 / 8 heads of 128, 768 tokens", "attention", ("sdpa", "sdpa+map", "eager"), tokens=768),
)
QUICK = (
    Case("N=256 d=64 b=32 B=2", "similarity", ("eager", "chunked"), samples=2, tokens=256, width=64, teacher_width=32),
    Case("N=512 d=64 b=32 B=2", "similarity", ("eager", "chunked"), samples=2, tokens=512, width=64, teacher_width=32),
    Case("attention, 4 / 2 heads of 16, 96 tokens", "attention", ("sdpa", "sdpa+map", "eager"), 1, 96, 64, 0, 4, 2, 8),
)


def step_of(case: Case, path: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return a function that solves the case once and returns the value and its gradients."""
    if case.kind == "attention":
        return attention_step(case, path)
    shape = case.tokens, case.width, case.teacher_width, case.samples
    return functools.partial(value_and_gradients, token_similarity.problem(CPU, torch.float32, *shape), path)


def attention_step(case: Case, path: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return the step of one decoder block's attention, without the projections, which cost the same on every path."""
    head_width = case.width // case.heads

    def leaf(heads: int) -> torch.Tensor:
        return torch.randn(case.samples, heads, case.tokens, head_width, requires_grad=True)

    leaves = query, key, value = leaf(case.heads), leaf(case.key_heads), leaf(case.key_heads)
    place_L = torch.arange(case.tokens)
    first, last = case.tokens - 2 * case.question, case.tokens - case.question  # the image ends where rows begin
    columns_BL = ((place_L >= case.question) & (place_L < first)).repeat(case.samples, 1)
    rows_BL = ((place_L >= first) & (place_L < last)).repeat(case.samples, 1)

    def attend() -> tuple[torch.Tensor, torch.Tensor | None]:
        if path == "eager":
            weights_BHLL = eager.attention_weights(query, key)
            captured_BL = eager.map_from_weights(weights_BHLL[:, :, first:last], rows_BL[:, first:last], columns_BL)
            return weights_BHLL @ value.repeat_interleave(case.heads // case.key_heads, 1), captured_BL
        captured = attention_map(query, key, rows_BL, columns_BL) if path == "sdpa+map" else None
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True), captured

    def step() -> tuple[torch.Tensor, ...]:
        output, captured_BL = attend()
        loss = output.square().mean()
        if captured_BL is not None:
            loss = loss + captured_BL.square().sum()
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return step


def measure(case: Case, path: str, repeats: int, threads: int) -> dict[str, object]:
    """Measure one path. It runs in a separate process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step_of(next(quick for quick in QUICK if quick.kind == case.kind), path)()  # loads the libraries
    step = step_of(case, path)
    extra = peak_megabytes(step, CPU)
    times = cpu_times(step, repeats, SHORT)
    wall, processor = [each.wall for each in times], [each.processor for each in times]
    return {"wall": wall, "processor": processor, "extra_megabytes": round(extra, 1)}


def in_fresh_process(case: Case, path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Call `measure` in a separate process."""
    request = json.dumps({"case": asdict(case), "path": path})
    shared = ["--threads", str(options.threads), "--repeats", str(options.repeats)]
    command = [sys.executable, "-m", "tools.benchmarks.kernels", *shared, "--measure", request]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: Case, options: argparse.Namespace) -> dict[str, object]:
    """Measure all paths of a case in turns for `rounds` rounds, with ratios to the first path."""
    runs: dict[str, list[dict[str, Any]]] = {path: [] for path in case.paths}
    for _ in range(options.rounds):
        for path in case.paths:
            runs[path].append(in_fresh_process(case, path, options))
    rows: dict[str, dict[str, float]] = {}
    for path, results in runs.items():
        rows[path] = {
            "wall_seconds": statistics.median(each for result in results for each in result["wall"]),
            "processor_seconds": statistics.median(each for result in results for each in result["processor"]),
            "extra_megabytes": max(result["extra_megabytes"] for result in results),
        }
    base = dict(rows[case.paths[0]])
    print(f"\n{case.name}")
    for path, row in rows.items():
        ratios = {f"{name}_ratio": round(value / max(base[name], 1e-9), 3) for name, value in row.items()}
        row.update({name: round(value, 4) for name, value in row.items()} | ratios)
        print(
            f"  {path:<9} wall {row['wall_seconds']:8.3f} s (x {row['wall_seconds_ratio']})"
            f"   processor {row['processor_seconds']:8.3f} s (x {row['processor_seconds_ratio']})"
            f"   extra {row['extra_megabytes']:7.1f} MB (x {row['extra_megabytes_ratio']})",
            flush=True,
        )
    return asdict(case) | {"results": rows}


def machine() -> dict[str, object]:
    """Return the processor and the versions that were measured."""
    return {"device": "cpu", "name": _processor(), "python": platform.python_version(), "torch": torch.__version__}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help=f"JSON file (default {RESULT.relative_to(ROOT)} without --quick)")
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds instead of minutes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="minimum timed runs per process (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="processes per path (default %(default)s)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure all cases, print them, and write them as JSON."""
    options = parse()
    if options.measure:
        request = json.loads(options.measure)
        print(json.dumps(measure(Case(**request["case"]), request["path"], options.repeats, options.threads)))
        return
    output = options.output or (None if options.quick else RESULT)
    document = {
        "command": shlex.join(["python", "-m", "tools.benchmarks.kernels", *sys.argv[1:]]),
        "what": "forward and backward together, float32; ratios are to the first path of each case",
        "threads": options.threads,
        "machine": machine(),
        "cases": [compare(case, options) for case in (QUICK if options.quick else FULL)],
    }
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
