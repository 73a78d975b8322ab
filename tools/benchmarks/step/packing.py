"""Compares padding with packing on the same micro-batches of phantoms, with questions and reports mixed."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medalign import phantom, pipeline
from medalign.data.order.order import GlobalOrder
from medalign.data.shards.index import ShardIndex
from medalign.student.loading import load_processor
from tools.benchmarks.step.forms import FORMS, Bench
from tools.benchmarks.step.measuring import WARM_UP


def measure_packing(bench: Bench, samples: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Measure the packaged student.

    Raises:
        AssertionError: padding and packing do not give the same loss.
    """
    form = next(form for form in FORMS if form.name == "medalign_online")
    phantom.write_phantoms(folder, 80, 1, 0)
    index = ShardIndex.open(folder / "train")
    processor = load_processor(bench.config.student)
    teacher_view = bench.teacher.preprocess_cfg
    collate = pipeline.build_collator(bench.config, bench.student.spec, processor, teacher_view, 1)
    order, padding = GlobalOrder(len(index), 0), []
    times: dict[str, list[float]] = {"padded": [], "packed": []}
    for turn in tqdm(range(WARM_UP + rounds), desc="packing"):
        drawn = [index.read(int(number)) for number in order.take(turn * samples, samples)]
        losses = []
        for way in times:
            collate.packed = way == "packed"
            bench.batch = collate(drawn)
            began = time.perf_counter()
            losses.append(bench.take(form)["loss/total"])
            if turn >= WARM_UP:
                times[way].append(time.perf_counter() - began)
            if way == "padded":
                padding.append(1 - float(bench.batch.attention_mask.float().mean()))
        assert abs(losses[0] - losses[1]) < 1e-3 * abs(losses[0]), "padding and packing must give the same loss"
    medians = {way: statistics.median(values) for way, values in times.items()}
    return {
        "samples": samples,
        "rounds": rounds,
        "padding_share": round(statistics.mean(padding), 3),
        "seconds": {way: round(value, 4) for way, value in medians.items()},
        "packed_to_padded": round(medians["packed"] / medians["padded"], 3),
    }
