"""Going back to the checkpoint before a spike of the loss, and leaving out the batches up to its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from medalign import distributed
from medalign.checkpoint.files import write_flushed
from medalign.checkpoint.loading import find_whole, load
from medalign.checkpoint.retention import point_to_best, remove_later
from medalign.checkpoint.state import TrainState
from medalign.config import TrainConfig
from medalign.engine.engine import Engine
from medalign.errors import DivergedError
from medalign.run_folder import CheckpointsFolder
from medalign.training.same_run import continue_state
from medalign.training.trainer import Trainer

log = logging.getLogger("medalign")


def fit(
    open_trainer: Callable[[TrainState], AbstractContextManager[Trainer]],
    state: TrainState,
    engine: Engine,
    root: Path,
    config: TrainConfig,
    progress: Callable[[str, float], None] = lambda what, more: None,
) -> TrainState:
    """Train up to the last step, and go back at most `train.rewind_on_spike` times. Every rank must call it.

    Args:
        open_trainer: gives a trainer that begins with a state.
        state: where the run stands.
        engine: the student and the optimizer of these trainers.
        root: folder of all checkpoints of the run.
        config: how often the run may go back.
        progress: called while a checkpoint of another number of ranks is loaded, see `load`.

    Returns:
        Where the run stands at the end.

    Raises:
        DivergedError: the run may not go back, or there is no checkpoint before the spike.
    """
    while True:
        with open_trainer(state) as trainer:
            try:
                return trainer.fit()
            except DivergedError as error:
                trainer.progress("going back to a checkpoint", slow=True)
                state = _rewind(engine, root, trainer.state, config, error, progress)


def _rewind(
    engine: Engine,
    root: Path,
    state: TrainState,
    config: TrainConfig,
    error: DivergedError,
    progress: Callable[[str, float], None],
) -> TrainState:
    """Load the last whole checkpoint before a spike, and make it the latest and newest. Every rank must call it.

    `state` is the one before the step that raised `error`, on all ranks. The next batch of the returned state is the
    one after that of this step.
    """
    limit, times = config.rewind_on_spike, state.rewinds + 1
    if times > limit:
        raise error if not limit else DivergedError(f"{error}. The run has gone back {limit} times before") from error
    found = find_whole(root, before=state.spike_start(state.step + 1))
    if found is None:
        raise DivergedError(f"{error}. There is no checkpoint before it to go back to") from error
    before = continue_state(load(engine, found, progress), state)
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            write_flushed(CheckpointsFolder(root).latest, found.name + "\n")
            point_to_best(root, before.best_step)
            remove_later(root, before.step)  # a further rewind must not go back to a history that was given up
    first, following = before.next_batch, state.next_batch + 1
    log.warning(
        "%s. The run goes back to %s (%d of at most %d times) and leaves out the global batches from there on: "
        "`medalign inspect RECIPE --keys --skip %d --steps %d` lists their samples",
        error,
        found,
        times,
        limit,
        first,
        following,
    )
    return replace(before, seconds=state.seconds, rewinds=times, skipped_batches=following - before.step)
