"""Deletion and insertion: does the answer depend on the patches that a map shows?

The patches of the image are removed in the order of the map (deletion), or restored in this order to an image without
any (insertion), and the probability of the student's own answer is recorded. Removed pixels have the mean color of the
tower, like padding. The area under the curve is small for deletion and large for insertion if the answer depends on the
first patches. A random order of the same patches gives what the number of patches alone does.

Published as causal metrics of saliency (Petsiuk et al. 2018, RISE), there with the probability of a class. Here it is
the geometric mean of the probabilities of the answer's tokens.

Shape suffixes: N patches, S pixels per side, B samples, K positions, V vocabulary size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medalign.contracts import IGNORE, Batch
from medalign.data.batches.collator import Collator, Prepared
from medalign.geometry import PatchGrid
from medalign.student.model import Student

ORDERS = ("map", "random")


@dataclass(frozen=True)
class Curves:
    """Areas under the curves of one sample, in [0, 1], and the answer's probability with all patches and with none."""

    deletion: float
    insertion: float
    deletion_random: float
    insertion_random: float
    whole: float
    nothing: float


def orders(map_N: np.ndarray, visible_N: np.ndarray, seed: str) -> dict[str, np.ndarray]:
    """Return the visible patches from the largest value to the smallest, and in random order.

    Equal values are in the random order, so a uniform map is as good as that.

    Args:
        map_N: one value per patch.
        visible_N: bool, whether the patch shows a part of the image.
        seed: determines the random order.
    """
    digest = hashlib.sha256(seed.encode()).digest()
    draw = np.random.default_rng(int.from_bytes(digest[:8]))
    shuffled = draw.permutation(np.flatnonzero(visible_N))
    return {"map": shuffled[np.argsort(-map_N[shuffled], kind="stable")], "random": shuffled}


def kept_patches(order: np.ndarray, patches: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which patches remain after each step of deletion, and of insertion: bool, [steps + 1, N] each.

    Args:
        order: the patches that are removed or restored, first to last.
        patches: N. Those that are not in the order remain.
        steps: steps from the whole image to none, of equal numbers of patches up to rounding.
    """
    numbers = np.linspace(0, len(order), steps + 1).round().astype(int)
    deleted, inserted = np.ones((2, steps + 1, patches), dtype=bool)
    for step, number in enumerate(numbers):
        deleted[step, order[:number]] = False
        inserted[step, order[number:]] = False
    return deleted, inserted


def without_patches(pixels: torch.Tensor, kept_N: np.ndarray, grid: PatchGrid) -> torch.Tensor:
    """Return pixels [3, S, S] that are 0, the mean color, outside the kept patches."""
    side = pixels.shape[-1]
    rows, columns = (torch.arange(side) * patches // side for patches in (grid.rows, grid.columns))
    kept = torch.from_numpy(kept_N).view(grid.rows, grid.columns).to(pixels.device)
    return pixels * kept[rows][:, columns]


def curves(
    student: Student,
    collator: Collator,
    prepared: Prepared,
    map_N: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    device: torch.device,
) -> Curves:
    """Measure deletion and insertion for one sample.

    Args:
        student: in evaluation mode.
        collator: with answers, padded on the right.
        prepared: the sample with the student's own answer. Patches of its first image are removed.
        map_N: the map on the student's grid.
        steps: points of a curve, less one.
        batch_size: images per forward pass.
        device: the student's device.
    """
    grid = student.spec.grid
    chosen = orders(map_N, prepared.patch_valid[0], prepared.key)
    kept = np.concatenate([part for name in ORDERS for part in kept_patches(chosen[name], grid.size, steps)])
    unique, places = np.unique(kept, axis=0, return_inverse=True)  # all curves have their ends in common
    first, *others = prepared.student_views
    variants = [prepared._replace(student_views=[without_patches(first, one, grid), *others]) for one in unique]
    found: list[float] = []
    for start in range(0, len(variants), batch_size):
        batch = collator.join(variants[start : start + batch_size]).to(device)
        found += answer_probability(student, batch).tolist()
    points = np.array(found)[places.reshape(-1)].reshape(len(ORDERS), 2, steps + 1)
    areas = np.trapezoid(points, dx=1 / steps, axis=-1)
    (deletion, insertion), (deletion_random, insertion_random) = areas.tolist()
    whole, nothing = points[0, 0, [0, -1]].tolist()
    return Curves(deletion, insertion, deletion_random, insertion_random, whole, nothing)


@torch.no_grad()
def answer_probability(student: Student, batch: Batch) -> torch.Tensor:
    """Return the geometric mean of the probabilities of each answer's tokens, its end included, float32 [B]."""
    output = student(batch, tap=False)
    labels_BK = batch.labels[:, output.kept + 1]
    supervised_BK = labels_BK != IGNORE
    log_BKV = output.logits.float().log_softmax(-1)
    log_BK = log_BKV.gather(-1, labels_BK.clamp_min(0)[..., None])[..., 0]
    probability_B: torch.Tensor = ((log_BK * supervised_BK).sum(1) / supervised_BK.sum(1)).exp()
    return probability_B


def mean_curves(found: Sequence[Curves]) -> dict[str, list[float]]:
    """Return what is averaged over samples: the areas, and what the map gains over the random order.

    A gain is positive if the map finds patches that matter: less probability in deletion, more in insertion.
    """
    return {
        "deletion": [one.deletion for one in found],
        "deletion_random": [one.deletion_random for one in found],
        "deletion_gain": [one.deletion_random - one.deletion for one in found],
        "insertion": [one.insertion for one in found],
        "insertion_random": [one.insertion_random for one in found],
        "insertion_gain": [one.insertion - one.insertion_random for one in found],
        "probability_whole": [one.whole for one in found],
        "probability_nothing": [one.nothing for one in found],
    }
