"""The tables of configurations, tried out on the GPU at hand and written: offline, never at run time."""

from __future__ import annotations

import datetime
import logging
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from medalign.benchmark.measurement import milliseconds
from medalign.errors import KernelError
from medalign.kernels import gpu
from medalign.kernels.case import Choice, KernelCase

log = logging.getLogger("medalign")


def tune_all(cases: Sequence[KernelCase], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Time every candidate of every entry for this device's architecture; write the fastest with its reason.

    One row an entry. Raises KernelError where kernels cannot run.
    """
    refusal = gpu.refusal(device)
    if refusal:
        raise KernelError(f"there is nothing to tune on: {refusal}")
    return [
        {"operation": case.name} | _tune(choice, device, repeats) for case in cases for choice in case.choices(device)
    ]


def _tune(choice: Choice, device: torch.device, repeats: int) -> dict[str, Any]:
    from medalign.kernels.triton_compiler import FAILURES

    times: dict[int, float] = {}
    for number, candidate in enumerate(choice.candidates):
        choice.use(candidate)
        try:
            times[number] = statistics.median(milliseconds(choice.step, device, repeats))
        except FAILURES as error:
            log.info("%s: %s is out: %s", choice.name, candidate, error)
    if not times:
        raise KernelError(f"{choice.name}: none of {len(choice.candidates)} candidates runs on {device}")
    best = min(times, key=times.__getitem__)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    reason = (
        f"{times[best]:.4g} ms, the fastest of {len(times)} on {name}, {choice.problem}, torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()}"
    )
    choice.use(choice.candidates[best])
    choice.write(choice.candidates[best], reason)
    return {"entry": choice.name, **choice.candidates[best], "ms": times[best], "slowest": max(times.values())}
