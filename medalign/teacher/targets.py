"""Distillation targets: the teacher's patch features and attention on the student's grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medalign.contracts import TeacherTargets
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid, resample_features, resample_map
from medalign.teacher.model import Inputs, TargetSource, by_name


@torch.no_grad()
def teacher_targets(
    teacher: TargetSource,
    inputs: Inputs,
    grid: PatchGrid,
    questions: Sequence[str] = (),
    reports: Sequence[str] = (),
) -> TeacherTargets:
    """Compute the targets and resample them bilinearly to the student's grid.

    The features are not normalized and the attention is not a distribution; the losses take care of both.

    Args:
        teacher: the frozen teacher.
        inputs: pixels normalized for the teacher, [I, 3, T, T], or what it reads by name.
        grid: the student's grid of N patches.
        questions: the question about each image, for a teacher whose attention follows the question.
        reports: the report of each image, empty for other tasks, for a teacher whose attention follows reports too.

    Returns:
        Features [I, N, b] and attention [I, N], both in float32; no attention if the teacher has none.
    """
    features, attention = teacher(inputs, questions, reports)
    return TeacherTargets(
        features=resample_features(features.float(), teacher.grid, grid),
        attention=None if attention is None else resample_map(attention.float(), teacher.grid, grid),
    )


class PendingTargets:
    """Targets that the teacher may still be computing on its stream.

    Args:
        targets: the targets.
        stream: CUDA stream that computes them; None if they are complete.
    """

    def __init__(self, targets: TeacherTargets, stream: torch.cuda.Stream | None) -> None:
        self._targets = targets
        self._stream = stream

    def result(self) -> TeacherTargets:
        """Return the targets for use on the current stream, which waits for the teacher's stream; the host does not."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            self._targets.features.record_stream(current)
            if self._targets.attention is not None:
                self._targets.attention.record_stream(current)
        return self._targets


class AsyncTeacher:
    """Runs the teacher on a separate CUDA stream, in parallel with the student; without CUDA, synchronously.

    Args:
        teacher: the frozen teacher, on the device of the pixels.
        grid: the student's grid.
        device: the device of both models.
    """

    def __init__(self, teacher: TargetSource, grid: PatchGrid, device: torch.device) -> None:
        self.teacher = teacher
        self.grid = grid
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, inputs: Inputs, questions: Sequence[str] = (), reports: Sequence[str] = ()) -> PendingTargets:
        """Start to compute the targets of images and return a handle to them.

        The host never waits. The caching allocator returns memory to the stream on which it was allocated, so every
        tensor that is used on a second stream is recorded there. Otherwise its memory could be overwritten while the
        second stream still reads it.

        Args:
            inputs: pixels normalized for the teacher, [I, 3, T, T], or what it reads by name.
            questions: the question about each image.
            reports: the report of each image; empty for other tasks.
        """
        if self.stream is None:
            return PendingTargets(teacher_targets(self.teacher, inputs, self.grid, questions, reports), None)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            targets = teacher_targets(self.teacher, inputs, self.grid, questions, reports)
        for tensor in by_name(inputs).values():
            tensor.record_stream(self.stream)
        return PendingTargets(targets, self.stream)


def assert_replicated(teacher: TargetSource) -> None:
    """Check that no parameter of the teacher is partitioned: every rank must hold a complete copy.

    ZeRO-3 marks the parameters that it manages with `ds_id` and frees them between uses. If the teacher were built
    inside `zero.Init` or attached to the student, the ranks would gather its parameters in different orders and hang.

    Raises:
        ConfigError: a parameter is partitioned.
    """
    for name, parameter in teacher.named_parameters():
        if hasattr(parameter, "ds_id") or parameter.numel() == 0:
            raise ConfigError(
                f"teacher parameter {name} is partitioned by ZeRO; build the teacher before the student and outside "
                "zero.Init, and do not attach it to the student"
            )
