"""Loads a frozen teacher from disk. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from medalign.geometry import PreprocessCfg
from medalign.teacher.model import Teacher
from medalign.teacher.source import find_teacher
from medalign.teacher.towers import tower_class


def load_teacher(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    random_weights_seed: int | None = None,
    features: str = "after_norm",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Teacher:
    """Load a frozen teacher. Under ZeRO-3, call it before the student is built, on every rank.

    Args:
        path: a local folder with the layout of open_clip's hub models, the folder of a vision model of transformers,
            or `open_clip:ARCH/WEIGHTS`, where WEIGHTS is a file (safetensors, or a torch file without pickled code).
            Tags are not supported, because nothing is downloaded.
        device: where the teacher runs.
        dtype: data type of its weights.
        random_weights_seed: use random weights drawn from this seed instead of reading them. An untrained teacher
            serves as a control.
        features: take patch features "after_norm" or "before_norm", that is after or before the tower's final norm.
        mean: per-channel mean for the normalization of pixels in [0, 1]; None takes the folder's.
        std: per-channel standard deviation; None takes the folder's.

    Raises:
        ConfigError: the source is not valid, or the kind of tower is not supported.
        CheckpointError: the weights cannot be read or do not fit the tower.
    """
    source = find_teacher(path, mean, std)
    kind = tower_class(source)
    kind.check(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_weights_seed or 0)
        tower = (kind.load if random_weights_seed is None else kind.build)(source, features)
    return Teacher(tower, source.mean, source.std).to(device=device, dtype=dtype)


def read_preprocess_cfg(
    path: str | Path, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> PreprocessCfg:
    """Read how a teacher takes its pixels from its configuration, as in `load_teacher`; its weights are not read."""
    source = find_teacher(path, mean, std)
    mean, std = source.mean, source.std
    size = tower_class(source).check(source)
    return PreprocessCfg(size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
