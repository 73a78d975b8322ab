"""The operations of a model, for the share of the GPU's peak that a run reaches (MFU)."""

from __future__ import annotations

import logging

import torch

from medalign.config import Config
from medalign.contracts import IGNORE, Batch
from medalign.engine.settings import precision
from medalign.errors import ConfigError
from medalign.planning.shapes import student_on_meta, teachers_on_meta
from medalign.planning.work import operations

log = logging.getLogger("medalign")
_LENGTH = 64  # any length: the operations are a polynomial


class ModelFlops:
    """Operations of a forward and backward pass over a batch, without padding and without recomputation.

    They are those of `planning.work.operations`, per sample `c_0 i + c_1 L + c_2 L^2 + c_3 K` with L tokens, K
    supervised tokens and i images.

    Args:
        config: the whole configuration.

    Raises:
        ConfigError: the operations of this student cannot be counted.
    """

    def __init__(self, config: Config) -> None:
        dtype = precision(config)
        student, teachers = student_on_meta(config.student, dtype), teachers_on_meta(config, dtype)

        def count(length: int, supervised: int) -> float:
            return operations(student, teachers, length, supervised, checkpointing=False).total

        self._image, once, twice = count(0, 0), count(_LENGTH, 0), count(2 * _LENGTH, 0)
        self._square = (twice - 2 * once + self._image) / (2 * _LENGTH**2)
        self._token = (once - self._image) / _LENGTH - self._square * _LENGTH
        self._supervised = count(0, 1) - self._image

    def __call__(self, batch: Batch) -> float:
        """Return the operations of a batch."""
        lengths = torch.tensor(batch.lengths) if batch.lengths else batch.attention_mask.sum(1)
        lengths = lengths.double()
        parts = (
            self._image * float(batch.image_weight.sum()),
            self._token * float(lengths.sum()),
            self._square * float(lengths.square().sum()),
            self._supervised * int((batch.labels != IGNORE).sum()),
        )
        return sum(parts)


def model_flops(config: Config) -> ModelFlops | None:
    """Return the operations of the run's models; None, after a warning, if they cannot be counted."""
    try:
        return ModelFlops(config)
    except ConfigError as error:
        log.warning("speed/tflops and speed/mfu are not logged: %s", error)
        return None
