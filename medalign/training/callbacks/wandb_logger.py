"""Weights & Biases: rows of metrics, and an alert where somebody should look at the run."""

from __future__ import annotations

from medalign.errors import DivergedError, Stopped
from medalign.observability.wandb_sink import WandbSink
from medalign.observability.watchdog import STATUS as HANG_STATUS
from medalign.training.callbacks.metrics import MetricLogger
from medalign.training.trainer import Trainer


class WandbLogger(MetricLogger):
    """Writes rows and alerts to W&B. Attach it on rank 0 only.

    The alerts have the step and the kind of an error. Messages of errors stay on the machine, because they contain
    paths and names of samples.

    Args:
        sink: talks to W&B.
    """

    def __init__(self, sink: WandbSink) -> None:
        super().__init__(sink)
        self._wandb = sink
        self._diverged = 0

    def on_train_start(self, trainer: Trainer) -> None:
        """Note the diverged steps of earlier starts."""
        self._diverged = trainer.state.diverged

    def on_step_end(self, trainer: Trainer) -> None:
        """Alert if the step was left out."""
        count = trainer.state.diverged
        if count > self._diverged:
            most = trainer.config.train.max_diverged_steps
            text = f"The update of step {trainer.state.step} was left out: {count} of at most {most} steps so far."
            self._wandb.alert("Loss or gradient not finite, or exploded", text, "WARN")
        self._diverged = count

    def on_train_end(self, trainer: Trainer) -> None:
        """Alert that the run is finished, if this start has taken a step."""
        if trainer.state.step > trainer.begun.step:
            self._wandb.alert("Run finished", f"All {trainer.total_steps} steps are done.", "INFO")

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Alert that the run has ended early, and close W&B with that status."""
        where = f"after step {trainer.state.step} of {trainer.total_steps}"
        if isinstance(error, Stopped):
            self._wandb.alert("Run preempted", f"Stopped by a signal {where}; the same command continues it.", "WARN")
            self._wandb.close(error.status, preempted=True, briefly=True)
        elif isinstance(error, DivergedError):
            self._wandb.alert("Run diverged", f"Loss or gradient not finite, or exploded, {where}.", "ERROR")
            self._wandb.close(1)
        else:
            self._wandb.alert("Run failed", f"{type(error).__name__} {where}.", "ERROR")
            self._wandb.close(1)

    def on_hang(self, trainer: Trainer) -> None:
        """Alert that the run hangs, and close W&B."""
        text = f"No progress after step {trainer.state.step}. The process ends; the stacks are in the run's folder."
        self._wandb.alert("Run hangs", text, "ERROR")
        self._wandb.close(HANG_STATUS, briefly=True)
