"""Deletion and insertion, on a student whose answer is known to depend on one patch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medalign.config import LoraConfig, StudentConfig
from medalign.contracts import IGNORE
from medalign.data.batches.collator import Prepared
from medalign.evaluation.patch_removal import answer_probability, curves, kept_patches, orders, without_patches
from medalign.geometry import PatchGrid
from medalign.student.loading import load_student
from tests import tiny

GRID = PatchGrid(4, 4)
KEY = 5  # the patch that the answer depends on
VISIBLE = np.arange(16) >= 4  # the first row is padding


def at(patch: int) -> np.ndarray:
    return np.eye(16)[patch]


class Depending:
    """A student that gives its answer the probability 0.8 with the patch KEY, and 0.2 without it."""

    spec = SimpleNamespace(grid=GRID)

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, batch: Any, *, tap: bool) -> Any:
        self.images += len(batch.pixels)
        seen = batch.pixels[:, 0].reshape(-1, 4, 8, 4, 8)[:, KEY // 4, :, KEY % 4].mean((1, 2))
        p = 0.2 + 0.6 * seen
        return SimpleNamespace(logits=torch.stack([p.log(), (1 - p).log()], -1)[:, None], kept=torch.tensor([0]))


class Joining:
    def join(self, prepared: list[Prepared]) -> Any:
        pixels = torch.stack([one.student_views[0] for one in prepared])
        batch = SimpleNamespace(pixels=pixels, labels=torch.tensor([[IGNORE, 0]] * len(prepared)))
        batch.to = lambda device: batch
        return batch


def measured(map_N: np.ndarray, key: str = "a", steps: int = 12):
    part = Prepared(key, "?", "", None, [torch.ones(3, 32, 32)], [], [VISIBLE])  # type: ignore[arg-type]
    student = Depending()
    found = curves(student, Joining(), part, map_N, steps=steps, batch_size=5, device=torch.device("cpu"))  # type: ignore[arg-type]
    return found, student.images


def test_a_map_at_the_patch_that_matters_removes_and_restores_the_answer_at_once():
    found, images = measured(at(KEY))
    # the probability changes between the first two of 13 points, and both ends count half
    assert found.deletion == pytest.approx(0.2 + 0.6 * 0.5 / 12) and found.insertion == pytest.approx(0.8 - 0.3 / 12)
    assert (found.whole, found.nothing) == pytest.approx((0.8, 0.2))
    assert images <= 4 * 11 + 2  # the whole image and the one without patches are the same in all curves


def test_a_map_at_the_last_patch_is_worse_than_random_and_one_without_contrast_equal():
    inverse, _ = measured(1 - at(KEY))
    assert inverse.deletion == pytest.approx(0.8 - 0.3 / 12) and inverse.insertion == pytest.approx(0.2 + 0.3 / 12)
    for key in "abc":
        flat, _ = measured(np.full(16, 0.3), key)
        assert (flat.deletion, flat.insertion) == (flat.deletion_random, flat.insertion_random)


def test_the_random_order_depends_on_the_sample_only():
    first, again, other = (orders(at(KEY), VISIBLE, key)["random"] for key in ("a", "a", "b"))
    assert (first == again).all() and (first != other).any() and sorted(first) == list(range(4, 16))
    assert orders(at(KEY), VISIBLE, "a")["map"][0] == KEY


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_steps_go_from_all_patches_to_none(steps):
    deleted, inserted = kept_patches(np.array([9, 4, 7, 12, 5]), 16, steps)
    assert deleted[0].all() and (np.flatnonzero(~deleted[-1]) == [4, 5, 7, 9, 12]).all()
    assert (inserted[0] == deleted[-1]).all() and inserted[-1].all()
    assert (np.diff(deleted.sum(1)) <= 0).all() and (np.diff(inserted.sum(1)) >= 0).all()


def test_pixels_of_removed_patches_have_the_mean_color():
    kept = without_patches(torch.ones(3, 10, 10), at(KEY) > 0, GRID)  # patches of 2 and 3 pixels
    assert kept.sum() == 3 * kept[0].sum() and kept[0, 3:5, 3:5].all() and kept[0].sum() == 4


def test_the_probability_is_that_of_the_tokens_and_does_not_depend_on_the_batch(student_folder):
    """fp32, 1e-5. The answers of the batch have different lengths."""
    settings = StudentConfig(path=str(student_folder), layer=2, lora=LoraConfig(rank=4, alpha=8), attention="sdpa")
    student, batch = load_student(settings, torch.float32).eval(), tiny.batch(texts=((5, 4), (9, 2)))
    with torch.no_grad():
        logits = student.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            pixel_values=batch.student_pixels,
        ).logits
    expected = []
    for row in range(2):
        places = [i for i in range(1, batch.labels.shape[1]) if batch.labels[row, i] != IGNORE]
        p = [logits[row, i - 1].softmax(-1)[batch.labels[row, i]].item() for i in places]
        expected.append(float(np.prod(p)) ** (1 / len(p)))
    assert answer_probability(student, batch).tolist() == pytest.approx(expected, rel=1e-5)
