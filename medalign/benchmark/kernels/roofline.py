"""The counted cost of each method and the minimum time it implies. All figures are derived, none measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medalign.benchmark.kernels.case import Cost, CostModel, KernelCase
from medalign.kernels.gpu import ARCHITECTURES, Architecture

TITLE = "counted from shapes; times derived from data sheets, not measured: no method can be faster on that card"


def cost_rows(cases: Sequence[KernelCase]) -> list[dict[str, Any]]:
    """One row per problem and method: operations, bytes, and the time that they imply."""
    return [
        _row(case.name, model, method, cost)
        for case in cases
        for model in case.cost_models()
        for method, cost in model.costs.items()
    ]


def _row(operation: str, model: CostModel, method: str, cost: Cost) -> dict[str, Any]:
    times = {
        f"{card.card.split()[0]} us (derived)": round(1e6 * _time(cost, card, model.half), 1)
        for card in ARCHITECTURES.values()
    }
    counts = {
        "Gop": round(cost.operations / 1e9, 2),
        "MB": round(cost.bytes / 1e6, 1),
        "op/least": round(cost.operations / model.costs["least"].operations, 2),
        "bytes/least": round(cost.bytes / model.costs["least"].bytes, 2),
    }
    return {"operation": operation, "problem": model.problem, "method": method} | counts | times


def _time(cost: Cost, card: Architecture, half: bool) -> float:
    speed = card.half_operations if half else card.tf32_operations
    return max(cost.operations / speed, cost.bytes / card.bandwidth)
