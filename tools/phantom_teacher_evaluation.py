"""How good a teacher is: what it tells apart without training for it, and whether it looks where the finding is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from medalign.data.phantom import KINDS, Study, stream, study
from medalign.geometry import CanvasFrame, coverage, square_canvas, view
from medalign.teacher.clip import CONFIG_NAME, WEIGHTS_NAME, Teacher, build_clip, load_teacher

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


@torch.no_grad()
def evaluate(folder: Path, tokenize: Tokenize, count: int, seed: int) -> dict[str, Any]:
    """Zero-shot accuracy and the share of attention inside the boxes, on `count` films of the test stream."""
    teacher = load_teacher(folder)
    items = [study(stream(seed, "test"), index) for index in range(count)]
    pixels = torch.stack([view(square_canvas(i.image), teacher.image_size, teacher.mean, teacher.std) for i in items])
    untrained = load_teacher(folder, random_weights_seed=seed)
    return {
        "films": count,
        "zero_shot": _zero_shot(folder, tokenize, items, pixels),
        "attention": _attention(teacher, items, pixels),
        "attention_untrained": _attention(untrained, items, pixels)["all"],
        "weights_bytes": (folder / WEIGHTS_NAME).stat().st_size,
    }


def _zero_shot(folder: Path, tokenize: Tokenize, items: list[Study], pixels: torch.Tensor) -> dict[str, Any]:
    """Present against absent by the nearer mean prompt; `chance` is the accuracy of the commoner answer."""
    model = build_clip(json.loads((folder / CONFIG_NAME).read_text())["model_cfg"]).eval()
    model.load_state_dict(load_file(folder / WEIGHTS_NAME))
    images = torch.cat([model.encode_image(chunk, normalize=True) for chunk in pixels.split(100)])

    def score(prompts: list[str]) -> torch.Tensor:
        return images @ model.encode_text(tokenize(prompts), normalize=True).T

    result: dict[str, Any] = {}
    for kind in KINDS:
        truth = np.array([any(found.kind == kind for found in item.findings) for item in items])
        # The log of the mean over prompts: a film fits a finding's prompts at one place, not on average.
        scale = model.logit_scale.exp()
        present = (scale * score(PRESENT[kind])).logsumexp(1) - np.log(len(PRESENT[kind]))
        absent = (scale * score(ABSENT[kind])).logsumexp(1) - np.log(len(ABSENT[kind]))
        margin = (present - absent).numpy()
        result[kind] = {
            "accuracy": float(((margin > 0) == truth).mean()),
            "chance": float(max(truth.mean(), 1 - truth.mean())),
            "balanced_accuracy": float(0.5 * ((margin > 0)[truth].mean() + (margin <= 0)[~truth].mean())),
            "auc": _auc(margin, truth),
        }
    names = ("accuracy", "chance", "balanced_accuracy", "auc")
    result["mean"] = {name: float(np.mean([result[kind][name] for kind in KINDS])) for name in names}
    for kind in ("nodule", "consolidation"):
        chosen = [i for i, item in enumerate(items) if sum(found.kind == kind for found in item.findings) == 1]
        places = [next(f.place for f in items[i].findings if f.kind == kind) for i in chosen]
        nearest = score([f"There is a small {kind} in the {place}." for place in PLACES])[chosen].argmax(1)
        hits = [PLACES[guess] == place for guess, place in zip(nearest.tolist(), places, strict=True)]
        result[f"{kind}_place"] = {"accuracy": float(np.mean(hits)), "chance": 1 / len(PLACES)}
    return result


def _auc(score: np.ndarray, truth: np.ndarray) -> float:
    ranks = score.argsort().argsort() + 1.0
    positives = truth.sum()
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * (~truth).sum()))


def _attention(teacher: Teacher, items: list[Study], pixels: torch.Tensor) -> dict[str, Any]:
    """Share of the class token's attention inside the boxes, the boxes' share of the film, and how often the most
    attended patch touches a box. By kind: films with findings of that kind alone."""
    chunks = [teacher(chunk)[1] for chunk in pixels.split(100)]
    maps = torch.cat(chunks).numpy()
    rows: dict[str, list[tuple[float, float, bool]]] = {kind: [] for kind in ("all", *KINDS)}
    for item, weight in zip(items, maps, strict=True):
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
