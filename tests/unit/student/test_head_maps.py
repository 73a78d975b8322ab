"""Maps of heads against eager attention in transformers."""

from __future__ import annotations

import pytest
import torch

from medalign.config import LoraConfig, StudentConfig
from medalign.contracts import IGNORE
from medalign.geometry import gather_images
from medalign.student.head_maps import head_maps
from medalign.student.loading import load_student
from medalign.student.model import Student
from medalign.student.packing import forward_arguments
from tests import tiny


def load(folder, attention: str = "sdpa") -> Student:
    settings = StudentConfig(path=str(folder), layer=2, lora=LoraConfig(rank=4, alpha=8), attention=attention)
    student = load_student(settings, torch.float32).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(student.steering.weight, std=0.05)
    return student


@pytest.mark.parametrize("side", ["right", "left"])
def test_each_head_of_each_block_has_the_weights_of_eager_attention(student_folder, side):
    """fp32, 1e-5: the sums differ only in their order. The model has two query heads per key head."""
    student, batch = load(student_folder), tiny.batch(side=side)
    predicting = torch.zeros_like(batch.question_mask)
    predicting[:, :-1] = batch.labels[:, 1:] != IGNORE
    found = head_maps(student, batch, [batch.question_mask, predicting])
    eager = load(student_folder, "eager")
    eager._begin_batch(batch)
    with torch.no_grad():
        weights = eager.model(
            input_ids=batch.input_ids,
            pixel_values=batch.student_pixels,
            output_attentions=True,
            **forward_arguments(batch),
        ).attentions
    assert [len(blocks) for blocks in found] == [3, 3]
    for rows, blocks in zip((batch.question_mask, predicting), found, strict=True):
        for weights_BHLL, map_INH in zip(weights, blocks, strict=True):
            mean_BLH = torch.stack([weights_BHLL[b][:, rows[b]].mean(1).T for b in range(2)])
            expected = gather_images(mean_BLH, batch.cells, 2, 16)
            assert map_INH.shape == (2, 16, 4) and expected.sum() > 0.1
            torch.testing.assert_close(map_INH, expected, rtol=1e-4, atol=1e-5)
    assert (found[0][2] - found[1][2]).abs().max() > 0.01  # the answer looks elsewhere


def test_their_mean_is_the_tapped_map_and_the_training_capture_is_back(student_folder):
    student, batch = load(student_folder), tiny.batch()
    maps = head_maps(student, batch, [batch.question_mask])[0]
    with torch.no_grad():
        tapped = student(batch).attention  # needs the capture of the training
    torch.testing.assert_close(maps[2].mean(-1), tapped, rtol=1e-5, atol=1e-6)


def test_a_packed_batch_is_refused(student_folder):
    batch = tiny.batch()
    batch.lengths = (3, 4)
    with pytest.raises(ValueError, match="packed"):
        head_maps(load(student_folder), batch, [batch.question_mask])
