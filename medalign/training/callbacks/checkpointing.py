"""Checkpoints at intervals, at the last step, and wherever the validation loss is the lowest so far."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from medalign import distributed
from medalign.checkpoint.saving import CheckpointWriter
from medalign.checkpoint.state import TrainState
from medalign.errors import CheckpointError, DivergedError
from medalign.training.trainer import Callback, Trainer

log = logging.getLogger("medalign")
RETRY_SECONDS = 10.0


class Checkpointing(Callback):
    """Writes checkpoints. Attach it on every rank, after the callbacks that decide what is best.

    Args:
        interval: steps between two checkpoints; the last step, the best one and a request to stop have one too.
        save: writes the checkpoint of a state and returns its folder; called on every rank.
        retry_minutes: how long the last checkpoint is tried again if it cannot be written.
        background: writes the checkpoints that the run does not wait for; None waits for each of them.
    """

    def __init__(
        self,
        interval: int,
        save: Callable[[TrainState], Path],
        retry_minutes: float = 0.0,
        background: CheckpointWriter | None = None,
    ) -> None:
        self.interval = interval
        self.save = save
        self.retry_minutes = retry_minutes
        self.background = background
        self._began = (0, 0.0, 0.0)  # step, time and seconds that the run waited, of the pending checkpoint

    def on_train_start(self, trainer: Trainer) -> None:
        """Record a validation that was made up for."""
        if trainer.state != trainer.begun:
            self._write(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        """Write a checkpoint if one is due, and call the hooks `on_checkpoint`."""
        state, last = trainer.state, trainer.state.step == trainer.total_steps or trainer.stopping is not None
        due = last or state.step == state.best_step or state.step % self.interval == 0
        if self.background and self.background.pending and (due or self.background.is_written()):
            self._finish(trainer, self.background)
        if due and self.background and not last:
            self._begin(trainer, self.background)
        elif due:
            self._write(trainer)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Complete a pending checkpoint if the error is one that all ranks raise."""
        if self.background is None or not self.background.pending:
            return
        if isinstance(error, DivergedError):
            self._finish(trainer, self.background)
        else:
            self.background.abandon()

    def _begin(self, trainer: Trainer, background: CheckpointWriter) -> None:
        step, now = trainer.state.step, time.perf_counter()
        trainer.progress(f"copying the state of step {step} for its checkpoint", slow=True)
        try:
            background.begin(trainer.state)
        except CheckpointError as error:
            _warn(step, error)
        self._began = (step, now, time.perf_counter() - now)

    def _finish(self, trainer: Trainer, background: CheckpointWriter) -> None:
        (step, began, waited), now = self._began, time.perf_counter()
        trainer.progress(f"completing the checkpoint of step {step}", slow=True)
        try:
            folder = background.finish()
        except CheckpointError as error:
            _warn(step, error)
            return
        done = time.perf_counter()
        log.info(
            "step %d: checkpoint written in %.1f s, of which the run waited %.1f s",
            step,
            done - began,
            waited + done - now,
        )
        trainer.call_hooks(lambda callback: callback.on_checkpoint(trainer, folder))

    def _write(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        folder = self._save_or_retry(trainer)
        if folder is not None:
            log.info("step %d: checkpoint written in %.1f s", trainer.state.step, time.perf_counter() - began)
            trainer.call_hooks(lambda callback: callback.on_checkpoint(trainer, folder))
        trainer.agree_to_stop()  # a signal that arrived meanwhile: the run must not take another step for it

    def _save_or_retry(self, trainer: Trainer) -> Path | None:
        """Save, or return None where a later checkpoint can take the place of one that cannot be written.

        The last checkpoint of a run is tried again for `retry_minutes`. All ranks fail and wait alike.

        Raises:
            CheckpointError: the last checkpoint of the run, or of a start that is asked to stop, cannot be written.
        """
        step, last = trainer.state.step, trainer.state.step == trainer.total_steps
        deadline = time.monotonic() + 60 * self.retry_minutes
        while True:
            trainer.progress(f"writing the checkpoint of step {step}", slow=True)
            try:
                return self.save(trainer.state)
            except CheckpointError as error:
                if not last and not trainer.stopping:
                    _warn(step, error)
                    return None
                # Rank 0 decides, because the clocks of the ranks differ.
                late = distributed.broadcast_from_main("late" if time.monotonic() > deadline else "") == "late"
                if trainer.stopping or late:
                    raise CheckpointError(f"{error}, then run the same command again") from error
                log.warning("step %d: %s. The last checkpoint is tried again in %.0f s", step, error, RETRY_SECONDS)
                time.sleep(RETRY_SECONDS)
                trainer.agree_to_stop()


def _warn(step: int, error: CheckpointError) -> None:
    log.warning("step %d: %s. The run continues, and the next checkpoint is tried when it is due", step, error)
