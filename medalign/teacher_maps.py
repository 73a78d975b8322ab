"""A teacher's attention to images, for the report: what an arm was taught beside what it learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medalign import distributed
from medalign.config import loading
from medalign.contracts import Sample
from medalign.engine.settings import precision
from medalign.errors import ConfigError
from medalign.geometry import PIXELS, PatchGrid, square_canvas
from medalign.run_folder import find_run
from medalign.student.checks import check_student
from medalign.teacher.loading import load_tower
from medalign.teacher.targets import teacher_targets


def teacher_maps(run: Path, samples: Sequence[Sample], grid: PatchGrid) -> list[np.ndarray]:
    """Compute the attention targets of samples as the training of a run would, from the first image of each.

    Args:
        run: the folder of the run, whose settings name the teacher.
        samples: samples with images.
        grid: the student's grid of N patches.

    Returns:
        For each sample, attention of any positive scale, [N].

    Raises:
        ConfigError: the settings or the models that they name cannot be used, or the teacher has no attention.
        CheckpointError: the teacher's weights cannot be read.
    """
    config = loading.read(find_run(run)[0].config)
    device = distributed.device()
    teacher = load_tower(replace(config.teacher, compile=False), device, precision(config))
    spec, processor = check_student(config.student)
    padding = spec.preprocess_cfg(processor).mean_color
    maps = []
    for sample in samples:
        pixels = teacher.view.inputs(square_canvas(sample.images[0], padding))[PIXELS][None].to(device)
        report = sample.answer if sample.task == "report" else ""
        attention = teacher_targets(teacher, pixels, grid, [sample.question], [report]).attention
        if attention is None:
            raise ConfigError(
                f"teacher {config.teacher.path} has no attention; leave the maps out with --no-teacher-maps"
            )
        maps.append(attention[0].cpu().numpy())
    return maps
