"""Storage: the run's folder, the space that checkpoints need, and the shards."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from medalign import pipeline
from medalign.config import Config
from medalign.data.samples.bad_sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.doctor.finding import Finding, Status
from medalign.planning.shapes import parameters, student_on_meta

_BYTES = 16  # per trainable parameter: 12 of AdamW and the float32 copy, and at most 4 of the export
_READ = 32  # samples that are read per data set


def check_run_folder(config: Config) -> Finding:
    """Write a file where the run will write. Nothing stays."""
    folder = existing(Path(config.run.dir))
    if not folder.is_dir():
        return Finding("run folder", "error", f"run.dir {config.run.dir}: {folder} is a file", "choose another run.dir")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding(
            "run folder",
            "error",
            f"run.dir {config.run.dir}: {folder} cannot be written: {reason}",
            "choose another run.dir, or change its permissions",
        )
    return Finding("run folder", "ok", f"{config.run.dir} can be written")


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_space(config: Config, free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free) -> Finding:
    """Compare the free space with what the checkpoints need: those that are kept, and the one that is being written.

    Args:
        config: the run's settings.
        free: returns the free bytes of a folder's file system.
    """
    trained = parameters(student_on_meta(config.student, torch.bfloat16), trainable=True)
    keep = config.checkpoint.keep_interval
    kept = (config.train.steps or 0) // keep if keep else 0  # with train.epochs, the number of steps is not known here
    count = config.checkpoint.save_total_limit + 1 + bool(config.train.evaluate_every) + kept
    need, found = count * trained * _BYTES, free(existing(Path(config.run.dir)))
    detail = f"{found / 2**30:.1f} GiB are free, and {count} checkpoints need {need / 2**30:.2f} GiB"
    if found < need:
        return Finding("space", "error", detail, "free space, or choose another run.dir")
    if found < 2 * need:
        return Finding("space", "warning", detail, "free space, because other jobs may write there too")
    return Finding("space", "ok", detail)


def check_shards(config: Config) -> Finding:
    """Read samples of the training and of the held-out shards, spread over all of them, and measure the speed."""
    details, faults = [], []
    total = 0
    for name, index in zip(("data.train", "data.validation"), pipeline.open_indexes(config), strict=True):
        if index is not None:
            count, seconds, bad = _read(index)
            total += count
            details.append(f"{name}: {len(index)} samples, {count / seconds:.0f} per second and process")
            faults += bad
    text = "; ".join(details) or "no shards are read, because train.steps is 0"
    if not faults:
        return Finding("shards", "ok", text)
    status: Status = "error" if len(faults) == total else "warning"
    what = f"{text}; {len(faults)} of {total} cannot be read, the first: {faults[0]}"
    return Finding("shards", status, what, "medalign shards index DIR, or write the shards again")


def _read(index: ShardIndex) -> tuple[int, float, list[str]]:
    """Read samples. Returns how many, the seconds, and why samples could not be read."""
    places = np.unique(np.linspace(0, len(index) - 1, _READ).astype(int)).tolist()
    faults, start = [], time.perf_counter()
    for place in places:
        try:
            index.read(place)
        except BadSample as error:
            faults.append(str(error))
    return len(places), max(time.perf_counter() - start, 1e-9), faults
