"""Checkpoints at intervals, at the last step, and wherever the validation loss is the lowest so far."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
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
        self._began: tuple[TrainState, float, float]  # state, time, seconds that the run waited: the pending checkpoint
        self._complete: TrainState  # of the last checkpoint that is complete

    def on_train_start(self, trainer: Trainer) -> None:
        """Record a validation that was made up for."""
        self._complete = trainer.begun
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
        state, now = trainer.state, time.perf_counter()
        trainer.progress(f"copying the state of step {state.step} for its checkpoint", slow=True)
        try:
            background.begin(state)
        except CheckpointError as error:
            self._give_up(trainer, state, error)
        self._began = (state, now, time.perf_counter() - now)

    def _finish(self, trainer: Trainer, background: CheckpointWriter) -> None:
        (state, began, waited), now = self._began, time.perf_counter()
        trainer.progress(f"completing the checkpoint of step {state.step}", slow=True)
        try:
            folder = background.finish()
        except CheckpointError as error:
            self._give_up(trainer, state, error)
            return
        self._complete, done = state, time.perf_counter()
        log.info(
            "step %d: checkpoint written in %.1f s, of which the run waited %.1f s",
            state.step,
            done - began,
            waited + done - now,
        )
        trainer.call_hooks(lambda callback: callback.on_checkpoint(trainer, folder))

    def _give_up(self, trainer: Trainer, state: TrainState, error: CheckpointError) -> None:
        """Go on without the checkpoint of a state. If it was to be the best one, the best one before it remains."""
        text = "step %d: %s. The run continues, and the next checkpoint is tried when it is due"
        log.warning(text, state.step, error)
        if trainer.state.best_step == state.step:
            before = self._complete
            trainer.state = replace(trainer.state, best_step=before.best_step, best_loss=before.best_loss)

    def _write(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        folder = self._save_or_retry(trainer)
        if folder is not None:
            self._complete = trainer.state
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
                    self._give_up(trainer, trainer.state, error)
                    return None
                # Rank 0 decides, because the clocks of the ranks differ.
                late = distributed.broadcast_from_main("late" if time.monotonic() > deadline else "") == "late"
                if trainer.stopping or late:
                    raise CheckpointError(f"{error}, then run the same command again") from error
                log.warning("step %d: %s. The last checkpoint is tried again in %.0f s", step, error, RETRY_SECONDS)
                time.sleep(RETRY_SECONDS)
                trainer.agree_to_stop()
