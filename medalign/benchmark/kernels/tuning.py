"""Tuning of the tile tables on the GPU at hand: offline, never at run time."""

from __future__ import annotations

import datetime
import logging
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medalign.benchmark.kernels.case import KernelCase, TuningEntry
from medalign.benchmark.kernels.measurement import milliseconds
from medalign.errors import KernelError
from medalign.kernels import gpu

log = logging.getLogger("medalign")


def tune_all(
    cases: Sequence[KernelCase],
    device: torch.device,
    repeats: int,
    folder: Path | None = None,
    seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Time the candidates of every entry for this device's architecture, and write the fastest with its reason.

    Args:
        cases: the operations.
        device: where to time the candidates.
        repeats: timed runs per candidate.
        folder: where to write copies of the tables, one file per operation; None to change the packaged tables.
        seconds: time limit per entry. The current tile is timed first, so a search that is cut short never selects a
            slower one.

    Returns:
        One row per entry.

    Raises:
        KernelError: kernels cannot run on the device.
    """
    refusal = gpu.refusal(device)
    if refusal:
        raise KernelError(f"kernels cannot be tuned here: {refusal}")
    rows = []
    for case in cases:
        for entry in case.tuning_entries(device):
            file = entry.table if folder is None else _copied(entry.table, folder / f"{case.name}.json")
            rows.append({"operation": case.name} | _tune(entry, device, repeats, file, seconds))
    return rows


def _copied(table: Path, target: Path) -> Path:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(table, target)
    return target


def _tune(entry: TuningEntry, device: torch.device, repeats: int, file: Path, seconds: float | None) -> dict[str, Any]:
    from medalign.benchmark.kernels.triton_compiler import FAILURES

    candidates = [entry.current, *(candidate for candidate in entry.candidates if candidate != entry.current)]
    times: dict[int, float] = {}
    begun, tried = time.monotonic(), 0
    for number, candidate in enumerate(candidates):
        if times and seconds is not None and time.monotonic() - begun > seconds:
            break
        tried += 1
        entry.use(candidate)
        try:
            times[number] = statistics.median(milliseconds(entry.step, device, repeats)[0])
        except FAILURES as error:
            log.info("%s: %s does not run: %s", entry.name, candidate, error)
    if not times:
        raise KernelError(f"{entry.name}: none of {len(candidates)} candidates runs on {device}")
    best = min(times, key=times.__getitem__)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    left = f" ({len(candidates) - tried} not tried)" if tried < len(candidates) else ""
    reason = (
        f"{times[best]:.4g} ms, the fastest of {len(times)}{left} on {name}, {entry.problem}, "
        f"torch {torch.__version__}, {datetime.date.today().isoformat()}"
    )
    entry.use(candidates[best])
    entry.write(candidates[best], reason, file)
    found = {"ms": times[best], "before": times.get(0, float("nan")), "slowest": max(times.values())}
    return {"entry": entry.name, **candidates[best]} | found | {"tried": tried, "of": len(candidates)}
