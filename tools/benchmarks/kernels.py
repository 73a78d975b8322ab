"""Time and memory of the distillation kernels: the eager form of the released code against the chunked path.

    python -m tools.benchmarks.kernels --output tools/benchmarks/results/kernels_cpu.json
    python -m tools.benchmarks.kernels --quick

Every measurement is forward and backward together in a process of its own, so that no path inherits another's
buffers. Times are medians over repetitions after one unmeasured run, by the wall clock and by processor time: on one
CPU thread the latter hardly depends on what else the machine does. Extra memory is the peak over what the inputs
take: resident memory of the process on the CPU, allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from medalign.kernels import attention_map, token_similarity

MEGABYTE = 2**20
SHORT = 5.0  # seconds; a measurement below it takes up to ten times the repetitions asked for


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


def eager_similarity(student_BND: torch.Tensor, teacher_BND: torch.Tensor) -> torch.Tensor:
    """The released code's form: two N x N matrices, their squared difference, and autograd's copies of them."""
    student_BND, teacher_BND = F.normalize(student_BND, dim=-1), F.normalize(teacher_BND, dim=-1)
    difference_BNN = student_BND @ student_BND.transpose(1, 2) - teacher_BND @ teacher_BND.transpose(1, 2)
    return (difference_BNN**2).mean((1, 2))


def similarity_step(case: Case, path: str, device: str) -> Callable[[], torch.Tensor]:
    student = torch.randn(case.samples, case.tokens, case.width, device=device, requires_grad=True)
    teacher = torch.randn(case.samples, case.tokens, case.teacher_width, device=device)

    def step() -> torch.Tensor:
        student.grad = None
        eager = path == "eager"
        loss = (eager_similarity(student, teacher) if eager else token_similarity(student, teacher, impl=path)).sum()
        loss.backward()
        return loss.detach()

    return step


def attention_step(case: Case, path: str, device: str) -> Callable[[], torch.Tensor]:
    """The attention of a decoder block, projections left out: they cost the same whichever way it attends."""
    head_width = case.width // case.heads

    def leaf(heads: int) -> torch.Tensor:
        return torch.randn(case.samples, heads, case.tokens, head_width, device=device, requires_grad=True)

    leaves = query, key, value = leaf(case.heads), leaf(case.key_heads), leaf(case.key_heads)
    place_L = torch.arange(case.tokens, device=device)
    first_row = case.tokens - 2 * case.question  # the image ends where the question begins
    columns_BL = ((place_L >= case.question) & (place_L < first_row)).repeat(case.samples, 1)
    rows_BL = ((place_L >= first_row) & (place_L < first_row + case.question)).repeat(case.samples, 1)
    future_LL = torch.ones(case.tokens, case.tokens, dtype=torch.bool, device=device).triu(1)

    def attend() -> tuple[torch.Tensor, torch.Tensor | None]:
        if path == "eager":
            group = case.heads // case.key_heads
            repeated_BHLD = key.repeat_interleave(group, 1)
            scores_BHLL = query @ repeated_BHLD.transpose(2, 3) / head_width**0.5
            weights_BHLL = scores_BHLL.masked_fill(future_LL, torch.finfo(torch.float32).min).softmax(-1)
            mapped_BL = weights_BHLL[:, :, rows_BL[0]].mean((1, 2)) * columns_BL
            return weights_BHLL @ value.repeat_interleave(group, 1), mapped_BL
        mapped = attention_map(query, key, rows_BL, columns_BL) if path == "sdpa+map" else None
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True), mapped

    def step() -> torch.Tensor:
        for each in leaves:
            each.grad = None
        mixed, mapped_BL = attend()
        loss = mixed.square().mean()
        if mapped_BL is not None:
            loss = loss + mapped_BL.square().sum()
        loss.backward()
        return loss.detach()

    return step


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(case: Case, path: str, device: str, repeats: int, threads: int) -> dict[str, object]:
    """Runs inside the fresh process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    make = similarity_step if case.kind == "similarity" else attention_step
    make(QUICK[0 if case.kind == "similarity" else 2], path, device)()  # loads the libraries
    step = make(case, path, device)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MEGABYTE
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
    step()
    if on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / MEGABYTE if on_gpu else resident("VmHWM")
    wall: list[float] = []
    processor: list[float] = []
    while len(wall) < repeats or (len(wall) < 10 * repeats and sum(wall) < SHORT):
        start, busy = time.perf_counter(), time.process_time()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    return {"wall": wall, "processor": processor, "extra_megabytes": round(peak - before, 1)}


def in_fresh_process(case: Case, path: str, options: argparse.Namespace) -> dict[str, object]:
    request = json.dumps({"case": asdict(case), "path": path})
    shared = ["--device", options.device, "--threads", str(options.threads), "--repeats", str(options.repeats)]
    command = [sys.executable, "-m", "tools.benchmarks.kernels", *shared, "--measure", request]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: Case, options: argparse.Namespace) -> dict[str, object]:
    """All paths of a case, `rounds` times in turn; ratios to the first path."""
    runs: dict[str, list[dict]] = {path: [] for path in case.paths}
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


def machine(device: str) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {"device": device, "name": name, "python": platform.python_version(), "torch": torch.__version__}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds instead of minutes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs in each process at least (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=1, help="processes for each path (default: %(default)s)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.measure:
        request = json.loads(options.measure)
        case = Case(**request["case"])
        print(json.dumps(measure(case, request["path"], options.device, options.repeats, options.threads)))
        return
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    cases = [compare(case, options) for case in (QUICK if options.quick else FULL)]
    document = {
        "command": " ".join(["python", "-m", "tools.benchmarks.kernels", *sys.argv[1:]]),
        "what": "forward and backward together, float32; ratios are to the first path of each case",
        "threads": options.threads,
        "machine": machine(options.device),
        "cases": cases,
    }
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
