"""What the student should match: the teacher's sight of each patch, on the student's grid."""

from __future__ import annotations

from collections.abc import Callable

import torch

from medalign.contracts import TeacherTargets
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid, resample_features, resample_map
from medalign.teacher.clip import Teacher


@torch.no_grad()
def teacher_targets(teacher: Teacher, pixels: torch.Tensor, grid: PatchGrid) -> TeacherTargets:
    """Features [I, N, b] and attention [I, N] in float32, for pixels [I, 3, T, T] and the student's `grid` of N.

    Both are resampled bilinearly, the features before they are normalized (the loss does that), the attention as
    it is (the loss makes it a distribution).
    """
    features, attention = teacher(pixels)
    return TeacherTargets(
        features=resample_features(features.float(), teacher.grid, grid),
        attention=resample_map(attention.float(), teacher.grid, grid),
    )


class AsyncTeacher:
    """The teacher on a CUDA stream of its own, so that it looks while the student begins; without CUDA, in line.

    Args:
        teacher: on the device of the pixels.
        grid: the student's.
        device: where both run.
    """

    def __init__(self, teacher: Teacher, grid: PatchGrid, device: torch.device) -> None:
        self.teacher = teacher
        self.grid = grid
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, pixels: torch.Tensor) -> Callable[[], TeacherTargets]:
        """Begin with the pixels [I, 3, T, T]; the function given back hands out the targets, on the caller's stream.

        No host waits: the caller's stream waits for the teacher's from the place where the function is called. The
        allocator gives memory back to the stream it was taken on, so each tensor that crosses over is recorded on
        the other stream: otherwise it could be overwritten while the other one still reads it.
        """
        if self.stream is None:
            targets = teacher_targets(self.teacher, pixels, self.grid)
            return lambda: targets
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            targets = teacher_targets(self.teacher, pixels, self.grid)
        pixels.record_stream(self.stream)

        def hand_over() -> TeacherTargets:
            assert self.stream is not None
            here = torch.cuda.current_stream(self.stream.device)
            here.wait_stream(self.stream)
            targets.features.record_stream(here)
            targets.attention.record_stream(here)
            return targets

        return hand_over


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
