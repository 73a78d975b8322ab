"""The teacher's separate CUDA stream, while the allocator reuses memory that the other stream still reads."""

from __future__ import annotations

import pytest
import torch

from medalign.geometry import PatchGrid
from medalign.teacher.loading import load_teacher
from medalign.teacher.model import Teacher
from medalign.teacher.targets import AsyncTeacher, teacher_targets

pytestmark = pytest.mark.gpu
GRID = PatchGrid(4, 4)
IMAGES = 512  # 14 MB of pixels: no other free block of the allocator is of that size
PAUSE = 200_000_000  # clock cycles that a stream sleeps, a tenth of a second


@pytest.fixture
def teacher(cuda, teacher_folder) -> Teacher:
    """A teacher that sleeps before it reads, so that the other stream works first."""
    teacher = load_teacher(teacher_folder, cuda)
    teacher.register_forward_pre_hook(lambda *_: torch.cuda._sleep(PAUSE))
    return teacher


def draw(cuda: torch.device, seed: int) -> torch.Tensor:
    return torch.randn(IMAGES, 3, 48, 48, device=cuda, generator=torch.Generator(cuda).manual_seed(seed))


def expected(teacher: Teacher, pixels: torch.Tensor):
    targets = teacher_targets(teacher, pixels, GRID)
    torch.cuda.synchronize()
    return targets.features.clone(), targets.attention.clone()


def overwritten(cuda: torch.device, beside: AsyncTeacher) -> tuple[bool, bool]:
    """Free the pixels at once and allocate again; return whether their memory was reused and the targets changed."""
    wanted = expected(beside.teacher, draw(cuda, 0))
    torch.cuda.empty_cache()
    pixels = draw(cuda, 0)
    place, shape = pixels.data_ptr(), pixels.shape
    torch.cuda.synchronize()
    targets = beside.submit(pixels)
    del pixels
    garbage = torch.full(shape, float("nan"), device=cuda)
    same_place = garbage.data_ptr() == place
    found = targets.result()
    torch.cuda.synchronize()
    return same_place, not same((found.features, found.attention), wanted)


def same(found, wanted) -> bool:
    """Whether targets are equal up to rounding, since another stream may use another algorithm.

    Convolutions may use TF32, which rounds both factors of a product by 2^-11. Overwritten memory gives NaN or the
    targets of another picture, which differ in the first digit.
    """
    rounding = 2 * 2**-11
    return all(
        torch.allclose(one, other, rtol=rounding, atol=rounding * float(other.abs().max()))
        for one, other in zip(found, wanted, strict=True)
    )


def test_pixels_are_kept_until_the_teacher_has_read_them(cuda, teacher):
    assert overwritten(cuda, AsyncTeacher(teacher, GRID, cuda)) == (False, False)


def test_without_the_record_the_memory_would_be_overwritten(cuda, teacher, monkeypatch):
    """A control: without the record, the test above would fail."""
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    assert overwritten(cuda, AsyncTeacher(teacher, GRID, cuda)) == (True, True)


def test_targets_are_kept_until_the_student_has_read_them(cuda, teacher):
    """The student's stream is delayed; meanwhile, the teacher encodes other pictures and needs memory."""
    beside = AsyncTeacher(teacher, GRID, cuda)
    wanted = [expected(teacher, draw(cuda, seed)) for seed in range(3)]
    read = []
    for seed in range(3):
        targets = beside.submit(draw(cuda, seed)).result()
        torch.cuda._sleep(2 * PAUSE)
        read.append((targets.features * 1.0, targets.attention * 1.0))
        del targets
    torch.cuda.synchronize()
    assert not same(wanted[0], wanted[1])
    assert all(same(found, other) for found, other in zip(read, wanted, strict=True))
