"""What the student should match: the teacher's sight of each patch, on the student's grid."""

from __future__ import annotations

import torch

from medalign.contracts import TeacherTargets
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid, resample_features, resample_map
from medalign.teacher.clip import Teacher


@torch.no_grad()
def teacher_targets(teacher: Teacher, pixels: torch.Tensor, grid: PatchGrid) -> TeacherTargets:
    """Features [I, N, b] and attention [I, N] in float32, for pixels [I, 3, T, T] and the student's `grid` of N.

    Both are resampled bilinearly, the features before they are normalised (the loss does that), the attention as
    it is (the loss makes it a distribution).
    """
    features, attention = teacher(pixels)
    return TeacherTargets(
        features=resample_features(features.float(), teacher.grid, grid),
        attention=resample_map(attention.float(), teacher.grid, grid),
    )


def assert_replicated(teacher: Teacher) -> None:
    """Raise ConfigError if a parameter of the teacher was partitioned: it must be whole on every rank.

    ZeRO-3 marks the parameters that it owns with `ds_id` and empties them between uses; a teacher that was built
    inside `zero.Init`, or attached to the student, would be gathered out of step with it and hang.
    """
    for name, parameter in teacher.named_parameters():
        if hasattr(parameter, "ds_id") or parameter.numel() == 0:
            raise ConfigError(
                f"teacher parameter {name} is partitioned by ZeRO; build the teacher before the student and outside "
                "zero.Init, and do not attach it to the student"
            )
