"""Progress and metrics in the terminal, or in a batch job's log."""

from __future__ import annotations

from collections.abc import Mapping

from medalign.observability.console import ConsoleSink
from medalign.training.callbacks.metrics import MetricLogger
from medalign.training.trainer import Trainer


class ConsoleLogger(MetricLogger):
    """Shows the metrics and moves the progress bar at each step. Attach it on rank 0 only."""

    def __init__(self, sink: ConsoleSink) -> None:
        super().__init__(sink)
        self.update_progress_bar = sink.tick

    def on_log(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Show the metrics of a training step."""
        if "loss/total" in values:  # a validation is announced by its own line
            super().on_log(trainer, values)

    def on_step_end(self, trainer: Trainer) -> None:
        """Move the progress bar."""
        self.update_progress_bar(trainer.state.step)
