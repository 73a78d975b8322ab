from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medalign.errors import ConfigError
from medalign.geometry import PatchGrid, resample_features, resample_map
from medalign.teacher.loading import load_teacher
from medalign.teacher.targets import AsyncTeacher, assert_replicated, teacher_targets

GOLDEN = Path(__file__).parents[3].parent / "shared" / "golden" / "official_losses.npz"
ROW_STEP, COLUMN_STEP = 7, 5  # the golden file contains every 7th row and 5th column of the 576 x 576 matrix


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.is_file():
        pytest.skip("the golden values of the released code are not available")
    return np.load(GOLDEN)


def test_targets_are_on_the_students_grid_in_float32(folder, pixels):
    teacher = load_teacher(folder, dtype=torch.bfloat16)
    targets = teacher_targets(teacher, pixels, PatchGrid(4, 4))
    assert targets.features.shape == (5, 16, 24) and targets.attention.shape == (5, 16)
    assert targets.features.dtype == targets.attention.dtype == torch.float32
    assert not targets.features.requires_grad and not targets.attention.requires_grad


def test_targets_on_the_teachers_own_grid_are_untouched(folder, pixels):
    teacher = load_teacher(folder)
    features, attention = teacher(pixels)
    targets = teacher_targets(teacher, pixels, teacher.grid)
    assert torch.equal(targets.features, features) and torch.equal(targets.attention, attention)


def test_without_cuda_the_teacher_runs_synchronously(folder, pixels):
    teacher = load_teacher(folder)
    async_teacher = AsyncTeacher(teacher, PatchGrid(4, 4), torch.device("cpu"))
    assert async_teacher.stream is None
    expected, found = teacher_targets(teacher, pixels, PatchGrid(4, 4)), async_teacher.submit(pixels).result()
    assert torch.equal(found.features, expected.features) and torch.equal(found.attention, expected.attention)


class Streams:
    """The CUDA stream functions that `AsyncTeacher` uses; `log` records their calls in order."""

    def __init__(self, patch):
        self.log, self.now, self.names = [], "student", {}
        streams = self

        class Stream:
            def __init__(self, device):
                self.device, self.name = device, "teacher"

            def wait_stream(self, other):
                streams.log.append(f"{self.name} waits for {other.name}")

        @contextmanager
        def use(stream):
            before, streams.now = streams.now, stream.name
            yield
            streams.now = before

        def current(device):
            stream = Stream(device)
            stream.name = streams.now
            return stream

        def record(tensor, stream):
            streams.log.append(f"{streams.names.get(id(tensor), tuple(tensor.shape))} kept for {stream.name}")

        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", use)
        patch.setattr(torch.cuda, "current_stream", current)
        patch.setattr(torch.Tensor, "record_stream", record)


def test_the_teachers_stream_waits_for_the_pixels_and_the_students_for_the_targets(monkeypatch, folder, pixels):
    teacher, streams = load_teacher(folder), Streams(monkeypatch)
    streams.names[id(pixels)] = "pixels"
    teacher.register_forward_hook(lambda *_: streams.log.append(f"the teacher runs on {streams.now}"))
    targets = AsyncTeacher(teacher, PatchGrid(4, 4), torch.device("cuda", 0)).submit(pixels)
    expected_log = ["teacher waits for student", "the teacher runs on teacher", "pixels kept for teacher"]
    assert streams.log == expected_log and streams.now == "student"
    found = targets.result()
    assert streams.log[3:] == [
        "student waits for teacher",
        "(5, 16, 24) kept for student",
        "(5, 16) kept for student",
    ]
    expected = teacher_targets(teacher, pixels, PatchGrid(4, 4))
    assert torch.equal(found.features, expected.features) and torch.equal(found.attention, expected.attention)


def test_a_teacher_outside_zero_passes_and_a_partitioned_one_does_not(folder):
    teacher = load_teacher(folder)
    assert_replicated(teacher)
    parameter = next(teacher.parameters())
    parameter.ds_id = 0
    with pytest.raises(ConfigError, match="partitioned by ZeRO"):
        assert_replicated(teacher)
    del parameter.ds_id
    teacher.tower.visual.proj = nn.Parameter(torch.empty(0), requires_grad=False)
    with pytest.raises(ConfigError, match=r"visual\.proj is partitioned"):
        assert_replicated(teacher)


def test_attention_is_resampled_as_the_released_code_does(golden):
    source = torch.from_numpy(golden["interp_attn14"])[None]
    resampled = resample_map(source, PatchGrid(14, 14), PatchGrid(24, 24))[0]
    torch.testing.assert_close(resampled, torch.from_numpy(golden["interp_attn24"]), rtol=1e-4, atol=1e-6)


def test_features_are_resampled_before_they_are_normalized_as_in_the_released_code(golden):
    source = torch.from_numpy(golden["interp_feat14"])[None]
    features = nn.functional.normalize(resample_features(source, PatchGrid(14, 14), PatchGrid(24, 24))[0], dim=-1)
    sample = (features @ features.T)[::ROW_STEP, ::COLUMN_STEP]
    torch.testing.assert_close(sample, torch.from_numpy(golden["interp_sim24_sample"]), rtol=1e-4, atol=1e-6)
