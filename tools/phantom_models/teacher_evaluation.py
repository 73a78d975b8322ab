"""Evaluates a teacher: its zero-shot accuracy, and its attention to findings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from medalign.geometry import CanvasFrame, coverage, square_canvas
from medalign.phantom import KINDS, Study, stream, study
from medalign.teacher.loading import load_teacher
from medalign.teacher.model import Teacher
from medalign.teacher.source import CONFIG_NAME, WEIGHTS_NAME
from medalign.teacher.towers.open_clip_vit import build_clip

Tokenize = Callable[[list[str]], torch.Tensor]
PLACES = [f"{side} {zone} zone" for side in ("right", "left") for zone in ("upper", "middle", "lower")]
SIZES = ("small", "large")
PRESENT = {
    "nodule": [f"There is a {size} nodule in the {place}." for size in SIZES for place in PLACES],
    "consolidation": [f"There is a {size} consolidation in the {place}." for size in SIZES for place in PLACES],
    "effusion": [f"There is a {size} {side} pleural effusion." for size in SIZES for side in ("right", "left")],
    "pneumothorax": [f"There is a {size} {side} pneumothorax." for size in SIZES for side in ("right", "left")],
    "cardiomegaly": ["The heart is enlarged.", "There is cardiomegaly.", "Enlarged cardiac silhouette."],
}
ABSENT = {
    "nodule": ["No nodule.", "No nodule is seen."],
    "consolidation": ["No consolidation.", "No focal consolidation is seen."],
    "effusion": ["No pleural effusion.", "The costophrenic angles are sharp."],
    "pneumothorax": ["No pneumothorax.", "No pneumothorax is seen."],
    "cardiomegaly": ["Heart size is normal.", "The heart is not enlarged."],
}


class Films(NamedTuple):
    """Films of one stream, preprocessed for the teacher."""

    items: list[Study]
    pixels: torch.Tensor  # [n, 3, T, T]

    def showing(self, kind: str) -> np.ndarray:
        """Return which films have a finding of this kind, [n] bool."""
        return np.array([any(found.kind == kind for found in item.findings) for item in self.items])


def films(teacher: Teacher, count: int, seed: int, split: str) -> Films:
    """Render the first `count` films of a split's stream."""
    items = [study(stream(seed, split), index) for index in range(count)]
    pixels = [teacher.preprocess_cfg.view(square_canvas(i.image)) for i in items]
    return Films(items, torch.stack(pixels))


@torch.no_grad()
def evaluate(folder: Path, tokenize: Tokenize, count: int, calibration: int, seed: int) -> dict[str, Any]:
    """Measure zero-shot accuracy and the share of attention inside the boxes, on `count` films of the test stream.

    Thresholds are chosen on `calibration` films of the val stream, which neither training nor the test uses.
    """
    teacher = load_teacher(folder)
    test, held_out = films(teacher, count, seed, "test"), films(teacher, calibration, seed, "val")
    untrained = load_teacher(folder, random_weights_seed=seed)
    return {
        "films": count,
        "calibration_films": calibration,
        "zero_shot": zero_shot(folder, tokenize, test, held_out),
        "attention": attention(teacher, test),
        "attention_untrained": attention(untrained, test)["all"],
        "weights_bytes": (folder / WEIGHTS_NAME).stat().st_size,
    }


@torch.no_grad()
def zero_shot(folder: Path, tokenize: Tokenize, test: Films, held_out: Films) -> dict[str, Any]:
    """Classify each finding as present or absent by the nearer prompts.

    `chance` is the accuracy of the more common answer. The `calibrated_` scores use the threshold that is best on
    `held_out` instead of equal scores, because the prompts of some findings resemble all films more than others.
    """
    model = build_clip(json.loads((folder / CONFIG_NAME).read_text())["model_cfg"]).eval()
    model.load_state_dict(load_file(folder / WEIGHTS_NAME))
    images, others = (
        torch.cat([model.encode_image(chunk, normalize=True) for chunk in part.pixels.split(100)])
        for part in (test, held_out)
    )

    def score(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images @ model.encode_text(tokenize(prompts), normalize=True).T

    def margin(images: torch.Tensor, kind: str) -> np.ndarray:
        # The log of the mean over prompts: a film matches the prompt for one place, not the average of all prompts.
        scale = model.logit_scale.exp()
        present = (scale * score(images, PRESENT[kind])).logsumexp(1) - np.log(len(PRESENT[kind]))
        absent = (scale * score(images, ABSENT[kind])).logsumexp(1) - np.log(len(ABSENT[kind]))
        return (present - absent).numpy()

    result: dict[str, Any] = {}
    for kind in KINDS:
        truth, margins = test.showing(kind), margin(images, kind)
        threshold = best_threshold(margin(others, kind), held_out.showing(kind))
        result[kind] = {
            "chance": float(max(truth.mean(), 1 - truth.mean())),
            **_decided(margins > 0, truth),
            "threshold": threshold,
            **{f"calibrated_{name}": value for name, value in _decided(margins > threshold, truth).items()},
            "auc": _auc(margins, truth),
        }
    names = [name for name in result[KINDS[0]] if name != "threshold"]
    result["mean"] = {name: float(np.mean([result[kind][name] for kind in KINDS])) for name in names}
    for kind in ("nodule", "consolidation"):
        nearest = score(images, [f"There is a small {kind} in the {place}." for place in PLACES]).argmax(1)
        result[f"{kind}_place"] = _placed(kind, nearest, test.items)
    return result


def best_threshold(margins: np.ndarray, truth: np.ndarray) -> float:
    """Return the threshold with the best accuracy, halfway between two neighboring margins."""
    order = margins.argsort()
    ordered = margins[order]
    # Correct answers if the i lowest are called absent: the absent ones among these, the present ones among the rest.
    right = (
        np.concatenate([[0], np.cumsum(~truth[order])]) + truth.sum() - np.concatenate([[0], np.cumsum(truth[order])])
    )
    ends = np.concatenate([[ordered[0] - 1], ordered, [ordered[-1] + 1]])
    best = int(right.argmax())
    return float((ends[best] + ends[best + 1]) / 2)


def _decided(called: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float((called == truth).mean()),
        "balanced_accuracy": float(0.5 * (called[truth].mean() + (~called)[~truth].mean())),
    }


def _placed(kind: str, nearest: torch.Tensor, items: list[Study]) -> dict[str, float]:
    """Return how often the nearest prompt gives the correct place, on films with one finding of the kind."""
    chosen = [i for i, item in enumerate(items) if sum(found.kind == kind for found in item.findings) == 1]
    places = [next(f.place for f in items[i].findings if f.kind == kind) for i in chosen]
    hits = [PLACES[guess] == place for guess, place in zip(nearest[chosen].tolist(), places, strict=True)]
    return {"accuracy": float(np.mean(hits)), "chance": 1 / len(PLACES)}


def _auc(score: np.ndarray, truth: np.ndarray) -> float:
    ranks = score.argsort().argsort() + 1.0
    positives = truth.sum()
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * (~truth).sum()))


@torch.no_grad()
def attention(teacher: Teacher, test: Films) -> dict[str, Any]:
    """Compare the class token's attention with the boxes, on all films with findings and on those of a single kind.

    Returns:
        For "all" and each kind: the share of the attention inside the boxes, the boxes' share of the film, their ratio,
        and how often the patch with the most attention touches a box.
    """
    maps = torch.cat([teacher(chunk)[1] for chunk in test.pixels.split(100)]).numpy()
    rows: dict[str, list[tuple[float, float, bool]]] = {kind: [] for kind in ("all", *KINDS)}
    for item, weight in zip(test.items, maps, strict=True):
        if not item.findings:
            continue
        frame = CanvasFrame(*item.image.size)
        inside = coverage([frame.to_unit(found.box) for found in item.findings], teacher.grid)
        picture = coverage([frame.picture], teacher.grid)
        row = ((inside * weight).sum() / weight.sum(), inside.sum() / picture.sum(), bool(inside[weight.argmax()] > 0))
        kinds = {found.kind for found in item.findings}
        for name in ("all", *(kinds if len(kinds) == 1 else ())):
            rows[name].append(row)
    result = {}
    for name, values in rows.items():
        share, area, hit = np.mean(np.array(values, dtype=float), axis=0)
        result[name] = {"films": len(values), "share": share, "area": area, "ratio": share / area, "pointing": hit}
    return result
