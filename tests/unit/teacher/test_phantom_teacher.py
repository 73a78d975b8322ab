"""The packaged teacher sees the findings: it looks at them, where the same tower untrained does not."""

from pathlib import Path

import pytest
import torch

import medalign
from medalign.data.phantom import stream, study
from medalign.geometry import CanvasFrame, PatchGrid, coverage, square_canvas, view
from medalign.teacher.clip import load_teacher
from medalign.teacher.targets import teacher_targets

FOLDER = Path(medalign.__file__).parent / "assets" / "phantom_teacher"
STUDENT_GRID = PatchGrid(8, 8)
LARGEST = 10 * 2**20  # bytes
FILMS = 120


@pytest.fixture(scope="module")
def films():
    """Held-out films with findings, and the share of each student patch that their boxes cover."""
    items = [item for item in (study(stream(11, "test"), index) for index in range(FILMS)) if item.findings]
    inside = []
    for item in items:
        frame = CanvasFrame(*item.image.size)
        inside.append(torch.from_numpy(coverage([frame.to_unit(found.box) for found in item.findings], STUDENT_GRID)))
    return items, torch.stack(inside)


def concentration(films, **how) -> float:
    """Share of attention inside the boxes over their share of the canvas, on the student's grid."""
    items, inside = films
    teacher = load_teacher(FOLDER, **how)
    pixels = [view(square_canvas(item.image), teacher.image_size, teacher.mean, teacher.std) for item in items]
    attention = teacher_targets(teacher, torch.stack(pixels), STUDENT_GRID).attention
    share = (attention * inside).sum(1) / attention.sum(1)
    return float(share.mean() / inside.mean())


def test_the_folder_is_small_enough_to_be_packaged():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= LARGEST


def test_its_attention_gathers_on_findings_and_that_of_an_untrained_tower_does_not(films):
    assert concentration(films) > 1.5
    assert concentration(films, random_weights_seed=0) < 1.2
