"""Measures time and memory of each form, in turns so that other load affects all of them, and plans blocks that fit."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medalign.assembly import parameter_groups
from medalign.config import Config, StudentConfig
from medalign.engine.engine import Engine
from medalign.engine.settings import deepspeed_settings
from medalign.student.model import Student
from medalign.teacher.model import Teacher
from tools.benchmarks.step import models, utilization
from tools.benchmarks.step.forms import FORMS, Bench, Form
from tools.benchmarks.step.models import Shape, Text

WARM_UP = 2  # rounds that are not measured: compilation, allocation, and ZeRO-3's trace of the order of the weights
# Largest relative difference of the losses. On a GPU, the convolution of a float32 tower may use TF32, which rounds
# both factors by 2^-11. bf16 rounds attention weights and activations to 8 bits.
AGREE = {torch.float32: 2 * 2**-11, torch.bfloat16: 2e-2}
GIB = 2**30
SPARE = 0.9  # share of the free memory to use: fragmentation and libraries take the rest

MakeStudent = Callable[[StudentConfig, torch.device, torch.dtype], Student]


def assemble(config: Config, make: MakeStudent, teacher: Teacher, samples: int, text: Text) -> Bench:
    """Build student, engine and batch on one rank, where weights are not sharded while they are loaded."""
    device = next(teacher.parameters()).device
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    student = make(config.student, device, next(teacher.parameters()).dtype)
    student.train()
    engine = Engine(student, parameter_groups(student, config), deepspeed_settings(config, 1))
    batch = models.make_batch(student, teacher.preprocess_cfg.size, samples, text)
    return Bench(engine, student, teacher, config, batch, before)


def measure(bench: Bench, rounds: int, name: str) -> dict[str, Any]:
    """Measure all forms; memory excludes the teacher's weights for forms without an online teacher.

    Raises:
        AssertionError: forms that must compute the same loss do not.
    """
    device = bench.engine.device
    times: dict[str, list[float]] = {form.name: [] for form in FORMS}
    peaks, losses = dict.fromkeys(times, 0.0), dict.fromkeys(times, float("nan"))
    lost: set[str] = set()
    for turn in tqdm(range(WARM_UP + rounds), desc=name):
        for form in FORMS:
            if form.name in lost:
                continue
            try:
                seconds, peak, losses[form.name] = _timed(bench, form, device)
            except torch.OutOfMemoryError:
                lost.add(form.name)
                continue
            if turn >= WARM_UP:
                times[form.name].append(seconds)
                peaks[form.name] = max(peaks[form.name], peak)
    _require_same(losses, lost, bench.student.dtype)
    flops = utilization.plain_flops(bench.student, bench.batch)
    rows = {
        form.name: _row(times[form.name], peaks[form.name], losses[form.name], flops, device)
        if form.name not in lost
        else {"out_of_memory": True}
        for form in FORMS
    }
    return _facts(bench, flops, rounds) | {"forms": rows} | _ratios(rows)


def _timed(bench: Bench, form: Form, device: torch.device) -> tuple[float, float, float]:
    """Make one step; return its seconds, its peak memory in bytes and its total loss."""
    on_gpu = device.type == "cuda"
    teacher = bench.teacher_bytes if form.distils and not form.given else 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    losses = bench.take(form)
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) - bench.before + teacher if on_gpu else 0.0
    return seconds, peak, losses["loss/total"]


def _require_same(losses: dict[str, float], lost: set[str], dtype: torch.dtype) -> None:
    found = [losses[form.name] for form in FORMS if form.distils and form.name not in lost]
    assert not found or max(found) - min(found) < AGREE[dtype] * abs(found[0]), f"the forms must agree: {losses}"


def _row(times: Sequence[float], peak: float, loss: float, flops: float, device: torch.device) -> dict[str, Any]:
    """Return a row of figures. Memory is None on the CPU, and MFU for a device without a known peak."""
    seconds = statistics.median(times)
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [seconds] * 4
    most = utilization.peak(utilization.card_name(device))
    return {
        "seconds": round(seconds, 5),
        "p20": round(fifths[0], 5),
        "p80": round(fifths[-1], 5),
        "peak_gib": round(peak / GIB, 2) if device.type == "cuda" else None,
        "mfu": round(flops / (seconds * most), 4) if most else None,
        "loss": loss,
    }


def _facts(bench: Bench, flops: float, rounds: int) -> dict[str, Any]:
    card = utilization.card_name(bench.engine.device)
    samples, length = bench.batch.input_ids.shape
    return {
        "image_tokens": bench.student.spec.grid.size,
        "samples": samples,
        "tokens_per_sample": length,
        "blocks": len(bench.student.spec.blocks),
        "width": bench.student.spec.width,
        "engine": bench.config.engine.deepspeed,
        "dtype": str(bench.student.dtype).removeprefix("torch."),
        "rounds": rounds,
        "plain_flops_per_step": flops,
        "mfu_formula": utilization.FORMULA,
        "peak_tflops": (utilization.peak(card) or 0) / 1e12 or f"not known for {card}: MFU is null",
    }


def _ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    def ratio(one: str, other: str) -> float | None:
        numerator, denominator = (rows[name].get("seconds") for name in (one, other))
        return round(numerator / denominator, 3) if numerator and denominator else None

    return {
        "medalign_given_to_plain": ratio("medalign_given", "plain"),
        "medalign_online_to_plain": ratio("medalign_online", "plain"),
        "released_given_to_medalign_given": ratio("released_given", "medalign_given"),
        "released_given_to_medalign_online": ratio("released_given", "medalign_online"),
        "released_online_to_medalign_online": ratio("released_online", "medalign_online"),
    }


def real_shapes(
    shape: Shape, samples: int, rounds: int, engine: str, folder: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Measure a student of random weights, with as many blocks as fit into the free memory of the GPU."""
    teacher = models.random_teacher(shape.teacher, folder, device, dtype)

    def bench_of(blocks: int) -> Bench:
        config = models.settings(samples, engine, models.tapped_layer(blocks), shape.rank)
        make = lambda student, *place: models.random_student(shape.with_blocks(blocks), student, *place)  # noqa: E731
        return assemble(config, make, teacher, samples, shape.text)

    blocks, plan = shape.blocks, {}
    if device.type == "cuda":
        plan = plan_blocks(bench_of, shape.blocks, device)
        blocks = plan["blocks"]
    return measure(bench_of(blocks), rounds, f"{blocks} blocks") | {"plan": plan}


def plan_blocks(bench_of: Callable[[int], Bench], wanted: int, device: torch.device) -> dict[str, Any]:
    """Extrapolate the number of blocks that fit, linearly from the peaks of the largest form with 2 and 4 blocks."""
    greedy = next(form for form in FORMS if form.name == "released_online")
    peaks = []
    for blocks in (2, 4):
        bench = bench_of(blocks)
        peaks.append(max(_timed(bench, greedy, device)[1] for _ in range(2)) - bench.teacher_bytes)
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    buffers = SPARE * torch.cuda.mem_get_info(device)[0]
    per_block = (peaks[1] - peaks[0]) / 2
    fitting = int((buffers - peaks[0] + 2 * per_block) // per_block)
    return {
        "free_gib": round(buffers / GIB, 2),
        "gib_per_block": round(per_block / GIB, 3),
        "gib_beside": round((peaks[0] - 2 * per_block) / GIB, 2),
        "blocks": min(wanted, max(2, fitting)),
    }
