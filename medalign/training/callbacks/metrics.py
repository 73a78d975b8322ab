"""Metrics go to a sink: a JSONL file, Weights & Biases, or any other."""

from __future__ import annotations

from collections.abc import Mapping

from medalign.observability.sinks import Sink
from medalign.training.trainer import Callback, Trainer


class MetricLogger(Callback):
    """Writes each row of metrics to a sink. Attach it on rank 0 only; whoever opened the sink closes it."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink

    def on_log(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Write a row of metrics."""
        self.sink.log(trainer.state.step, values)

    def close(self) -> None:
        """Flush and close the sink."""
        self.sink.close()
