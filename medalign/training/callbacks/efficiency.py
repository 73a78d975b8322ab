"""How well a run uses its hardware: operations per second, their share of the peak, and the teacher's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from medalign import distributed
from medalign.contracts import Batch
from medalign.observability.meters import ModuleTimer
from medalign.training.trainer import Callback, Trainer


class Efficiency(Callback):
    """Adds `speed/tflops`, `speed/mfu` and `speed/teacher_share` to the rows. Attach it on every rank.

    Args:
        operations: counts the operations of a micro-batch; None leaves out both rates.
        peak: operations per second that the GPU can reach; None leaves out `speed/mfu`.
        teachers: measure the teachers; none leaves out their share.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        operations: Callable[[Batch], float] | None,
        peak: float | None,
        teachers: Sequence[ModuleTimer],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._operations, self._peak, self._teachers, self._clock = operations, peak, teachers, clock
        self._done, self._began = 0.0, 0.0

    def on_train_start(self, trainer: Trainer) -> None:
        """Start the clock."""
        self._restart()

    def on_batch(self, trainer: Trainer, micro_batches: Sequence[Batch]) -> None:
        """Count the operations of the step."""
        if self._operations is not None:
            self._done += sum(map(self._operations, micro_batches))

    def metrics(self, trainer: Trainer) -> Mapping[str, float]:
        """Return the means over the ranks since the last row."""
        teacher = sum(timer.take() for timer in self._teachers)
        local = torch.tensor([self._done, teacher, self._clock() - self._began], dtype=torch.float64)
        sums = distributed.sum_over_ranks({"efficiency": local.to(trainer.step.engine.device)})
        done, teacher, seconds = sums["efficiency"].tolist()
        self._restart()
        rate, found = done / max(seconds, 1e-9), {}  # operations per second and rank
        if self._operations is not None:
            found["speed/tflops"] = rate / 1e12
            if self._peak is not None:
                found["speed/mfu"] = rate / self._peak
        if self._teachers:
            found["speed/teacher_share"] = teacher / max(seconds, 1e-9)
        return found

    def _restart(self) -> None:
        self._done, self._began = 0.0, self._clock()
