"""Teacher patch i and student token i see the same pixels, also on images that are not square."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from medalign.config import LoraConfig, StudentConfig
from medalign.contracts import Sample
from medalign.data.batches.collator import Collator
from medalign.data.batches.prompts import PromptEncoder
from medalign.geometry import CanvasFrame, coverage
from medalign.student.loading import load_processor, load_student
from medalign.teacher.loading import load_teacher
from medalign.teacher.targets import teacher_targets


def sample(image: Image.Image) -> Sample:
    return Sample("key", "shard", "vqa", "Where?", "here", "open", (image,))


@pytest.mark.parametrize("size", [(120, 80), (80, 160), (96, 96)])
def test_a_marker_moves_the_same_patch_of_both(student_folder, teacher_folder, size):
    """Put a white square on each patch of the student's grid in turn.

    The student's token and the teacher's resampled feature that change most are those of the patch under the square.
    """
    config = StudentConfig(path=str(student_folder), layer=1, lora=LoraConfig(rank=4))
    student, teacher = load_student(config, torch.float32).eval(), load_teacher(teacher_folder)
    anatomy, processor = student.spec, load_processor(config)
    own = anatomy.preprocess_cfg(processor)
    encoder = PromptEncoder(processor, image=anatomy.image, max_length=200)
    collate = Collator(encoder, own, teacher.preprocess_cfg)

    def look(image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate([sample(image)])
        with torch.no_grad():
            tokens = student.spec.projector.linear_1(
                student.model.get_image_features(
                    pixel_values=batch.student_pixels, output_hidden_states=True
                ).hidden_states[0][:, 1:]
            )
            features = teacher_targets(teacher, batch.teacher_pixels, anatomy.grid).features
        return tokens[0], features[0]

    gray = Image.new("L", size, 110)
    frame = CanvasFrame(*size)
    before = look(gray)
    checked = 0
    for row in range(anatomy.grid.rows):
        for column in range(anatomy.grid.columns):
            box = _patch_in_pixels(row, column, anatomy.grid.rows, frame)
            if box is None:
                continue
            marked = np.array(gray)
            x0, y0, x1, y1 = box
            marked[y0:y1, x0:x1] = 255
            expected = int(np.argmax(coverage([frame.to_unit(box)], anatomy.grid)))
            assert expected == row * anatomy.grid.columns + column
            after = look(Image.fromarray(marked))
            student_moved = (after[0] - before[0]).norm(dim=-1)
            teacher_moved = (after[1] - before[1]).norm(dim=-1)
            assert int(student_moved.argmax()) == expected
            assert int(teacher_moved.argmax()) == expected
            checked += 1
    assert checked >= 8


def _patch_in_pixels(row: int, column: int, side: int, frame: CanvasFrame) -> tuple[int, int, int, int] | None:
    """Return the patch in pixels of the image, if it is entirely inside the image."""
    step = frame.side / side
    x0, y0 = round(column * step) - frame.left, round(row * step) - frame.top
    x1, y1 = round((column + 1) * step) - frame.left, round((row + 1) * step) - frame.top
    inside = x0 >= 0 and y0 >= 0 and x1 <= frame.width and y1 <= frame.height
    return (x0, y0, x1, y1) if inside else None
