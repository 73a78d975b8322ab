"""Progress of a run, as a checkpoint records it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from medalign.errors import CheckpointError
from medalign.run_folder import CheckpointFolder, CheckpointsFolder

WINDOW = 20  # steps: so many losses tell what the next one may be, and so many good steps end a spike


@dataclass(frozen=True)
class TrainState:
    """Progress of a run. `step` is the number of completed steps and the index of the next one."""

    step: int
    samples: int  # of these steps
    ranks: int
    skipped: int = 0
    truncated: int = 0
    diverged: int = 0  # steps without an update, because their loss or gradient was not finite, or exploded
    losses: tuple[float, ...] = ()  # total losses of the last good steps; only kept with train.max_loss_ratio
    seconds: float = 0.0  # spent in the training loop of rank 0, checkpoints included, pauses between starts left out
    stage: int | None = None  # of ZeRO; None where it was not written down
    data: tuple[str, ...] = ()  # fingerprint of each training folder; empty where it was not written down
    held_out: tuple[str, ...] = ()  # the same of the held-out folders; empty also where none was evaluated
    best_step: int | None = None  # the step with the lowest loss on held-out shards; None where none was evaluated
    best_loss: float | None = None  # that loss
    evaluated_step: int | None = None  # the last step whose validation is complete
    spike: tuple[int, ...] = ()  # the first and the last diverged step of the current spike
    rewinds: int = 0  # how often the run went back to a checkpoint before a spike
    skipped_batches: int = 0  # global batches that were left out by these rewinds

    @property
    def next_batch(self) -> int:
        """Index of the global batch of the next step in the order of the data."""
        return self.step + self.skipped_batches

    def spike_start(self, done: int) -> int:
        """Return the first step of the spike that a diverged step `done` belongs to.

        Diverged steps belong to one spike if there are fewer than 20 steps between them.
        """
        return self.spike[0] if self.spike and done - self.spike[1] <= WINDOW else done


def write_state(folder: Path, state: TrainState) -> None:
    """Record the state in the checkpoint `folder`."""
    CheckpointFolder(folder).progress.write_text(json.dumps(asdict(state)) + "\n")


def read_state(folder: Path) -> TrainState:
    """Read where the run stood when the checkpoint was written.

    Raises:
        CheckpointError: the file is damaged or of another version.
    """
    path = CheckpointFolder(folder).progress
    try:
        values = json.loads(path.read_text())
        lists = {name: tuple(values.get(name, ())) for name in ("data", "held_out", "losses", "spike")}
        return TrainState(**{**values, **lists})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is damaged or of another version; "
            f"write the name of an earlier checkpoint into {CheckpointsFolder(folder.parent).latest}"
        ) from error
