"""What a destination of a run's metrics is. Only rank 0 creates sinks."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, Protocol


class Sink(Protocol):
    """Destination of the metrics of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one step."""

    def close(self) -> None:
        """Finish writing."""


def to_python_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Convert metrics to Python numbers.

    Raises:
        TypeError: a value is not a number, such as text, an image or a tensor; the message names the metric.
    """
    for name, value in values.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"metric {name!r} is {type(value).__name__}; only numbers can be logged")
    return {k: int(v) if isinstance(v, numbers.Integral) else float(v) for k, v in values.items()}
