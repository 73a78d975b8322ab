"""Separability of tokens that are known to separate, or not to."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from medalign.contracts import Sample
from medalign.evaluation import separability as rules
from medalign.evaluation.regions import Film, choose_patches
from medalign.evaluation.separability import Labels, chance, separability
from medalign.geometry import PatchGrid

IMAGES, EACH = 20, 10


def labels(label_T: np.ndarray | None = None) -> Labels:
    """Half of the tokens of each image are inside, in the first row of a grid of two rows."""
    inside = np.tile(np.repeat(["inside", "outside"], EACH // 2), IMAGES)
    place_T = np.stack([np.tile(np.repeat([0, 1], EACH // 2), IMAGES), np.tile(np.arange(EACH // 2), 2 * IMAGES)], 1)
    return Labels(inside if label_T is None else label_T, np.repeat(np.arange(IMAGES), EACH), place_T)


def tokens(shift: float, given: Labels, seed: int = 0, size: int = 16) -> np.ndarray:
    """Noise, shifted to one side inside, and to the other outside."""
    noise = np.random.default_rng(seed).normal(size=(len(given.label_T), size))
    noise[:, 0] += shift * np.where(given.label_T == "inside", 1, -1)
    return noise


def test_tokens_that_separate_and_tokens_that_do_not():
    far, none = separability(tokens(40.0, labels()), labels()), separability(tokens(0.0, labels()), labels())
    assert far["probe"] == far["probe_low"] == far["neighbors"] == 1.0 and far["silhouette"] > 0.4
    assert none["probe_low"] < 0.5 < none["probe_high"] and abs(none["silhouette"]) < 0.02
    assert none["neighbors"] == pytest.approx(0.5, abs=0.1)


def test_chance_and_a_probe_that_knows_only_the_place():
    found = chance(labels())
    assert (found["probe"], found["silhouette"], found["neighbors"], found["position"]) == (0.5, 0.0, 0.5, 1.0)
    anywhere = Labels(labels().label_T, labels().image_T, np.zeros((IMAGES * EACH, 2), dtype=int))
    assert chance(anywhere)["position"] == 0.5


def test_the_probe_is_not_scored_on_images_that_it_was_fitted_to():
    """Tokens name their image, and the label is that of the image: without the split, the probe would score 1."""
    named = np.repeat(np.where(np.random.default_rng(3).random(IMAGES) < 0.5, "inside", "outside"), EACH)
    given = labels(named)
    assert separability(np.eye(IMAGES)[given.image_T] + tokens(0.0, given, size=IMAGES) / 100, given)["probe"] < 0.7


def test_classes_count_equally():
    """A probe that always answers the frequent class is right in one of two classes."""
    given = labels(np.where(np.arange(IMAGES * EACH) % EACH == 0, "rare", "frequent"))
    hits = (given.label_T == "frequent").astype(float)
    assert rules._balanced("probe", hits, given) == {"probe": 0.5, "probe_low": 0.5, "probe_high": 0.5}


def test_neighbors_are_those_of_other_images():
    given, values = labels(), tokens(1.0, labels(), seed=5)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    shares = []
    for i in range(len(unit)):
        others = [j for j in range(len(unit)) if given.image_T[j] != given.image_T[i]]
        nearest = sorted(others, key=lambda j: -float(unit[i] @ unit[j]))[: rules.NEIGHBORS]
        shares.append(np.mean([given.label_T[j] == given.label_T[i] for j in nearest]))
    assert separability(values, given)["neighbors"] == pytest.approx(np.mean(shares))


def test_one_class_or_too_few_images_cannot_be_measured():
    assert labels().usable and not labels(np.repeat("inside", IMAGES * EACH)).usable
    few = np.where(labels().image_T < rules.FOLDS - 1, "rare", "frequent")
    assert not labels(few).usable


GRID = PatchGrid(8, 8)


def sample(boxes, **metadata) -> Sample:
    return Sample("a", "none", "vqa", "?", "yes", "closed", (Image.new("L", (64, 48)),), boxes, metadata)  # type: ignore[arg-type]


def test_patches_inside_and_outside_of_all_boxes_of_an_image():
    film = Film(3, (64, 48))  # the first and the last row of the grid are padding
    film.add(sample([(0, 0, 16, 16)], findings=[{"kind": "nodule", "box": [0, 0, 16, 16]}]))
    film.add(sample([(0, 0, 16, 16), (32, 0, 52, 8)], finding="effusion"))
    found = choose_patches(film, GRID)
    assert found.inside.tolist() == [True] * 7 + [False] * 7 and set(found.classes[7:]) == {""}
    rows, columns = (part.tolist() for part in np.divmod(found.places, 8))
    classes = dict(zip(zip(rows[:7], columns[:7], strict=True), found.classes.tolist()[:7], strict=True))
    nodule = dict.fromkeys([(1, 0), (1, 1), (2, 0), (2, 1)], "nodule")  # the first sample that names it decides
    assert classes == nodule | dict.fromkeys([(1, 4), (1, 5), (1, 6)], "effusion")  # half of the last is covered
    assert set(rows) <= {1, 2, 3, 4, 5, 6}
    again = choose_patches(film, GRID)
    assert (again.places == found.places).all()


def test_the_list_of_findings_names_boxes_and_overlapping_findings_have_no_class():
    film = Film(0, (64, 64))
    kinds = [{"kind": "nodule", "box": [0, 0, 16, 16]}, {"kind": "effusion", "box": [8, 0, 16, 8]}, "damaged"]
    film.add(sample([(0.0, 0.0, 16.0, 16.0), (8, 0, 16, 8)], findings=kinds))
    found = choose_patches(film, GRID)
    classes = dict(zip(found.places.tolist(), found.classes.tolist(), strict=True))
    assert (classes[0], classes[1], classes[8], classes[9]) == ("nodule", "", "nodule", "nodule")


@pytest.mark.parametrize("boxes", [[], [(0, 0, 64, 64)], [(1, 1, 3, 3)]])
def test_an_image_without_an_inside_or_without_an_outside_has_no_patches(boxes):
    film = Film(0, (64, 64))
    film.add(sample(boxes))
    assert len(choose_patches(film, GRID).places) == 0
