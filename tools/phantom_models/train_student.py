"""Train the packaged base student: a small LLaVA that has seen text and pictures, but no disease.

    OMP_NUM_THREADS=1 python -m tools.phantom_models.train_student      # from scratch, as the packaged one was trained

1. The vision tower learns to restore radiographs and random pictures from noisy copies with missing patches, and to
   outline the plain shapes that are drawn on them.
2. Tower, projector and language model learn to answer questions about plain shapes, gray levels, format and exposure
   (`student/pictures.py`), while the tower continues to restore pictures. The attention of a question is trained to
   point at the subject of the question, as grounded captions do for general models. Without this, a model of this size
   does not learn more than guessing within the steps that two cores can compute.
3. At the same time, the language model reads reports and medical questions about radiographs that it is not shown. It
   learns the words and the kinds of answer, but not their relation to a picture. No finding is ever shown to the tower.

The studies come from the split `pretrain`, which no training or evaluation of the product uses.

Shapes: B samples, N patches, L tokens, T turns, C kinds and tones of shape, S pixels of a side.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn
from tqdm import tqdm

from medalign.contracts import IGNORE
from medalign.phantom import stream, study
from tools.phantom_models.student import folder
from tools.phantom_models.student.lessons import (
    Course,
    Lesson,
    blind_accuracy,
    finding_questions,
    generic_texts,
    phantom_texts,
    shape_questions,
)
from tools.phantom_models.student.pictures import SHAPES, TONES, Turn

OUTLINES = 10.0  # weight of the shapes' outlines
POINTING = (1, 2)  # blocks of the language model whose attention is trained to point
CONTEXT = 9  # a token also restores the 3 x 3 patches around it, at 9 x 9 pixels


class Restorer(nn.Module):
    """Linear heads on the patch tokens: fine detail of a token's own patch, its surroundings, and plain shapes."""

    def __init__(self, width: int):
        super().__init__()
        self.restore = nn.Linear(width, folder.PATCH**2 + CONTEXT**2)
        self.outline = nn.Linear(width, len(SHAPES) + len(TONES))

    def forward(self, tokens_BND: Tensor, clean_BSS: Tensor, cover_BCSS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean squared error of the restored pixels and the cross-entropy of the share that shapes cover."""
        share_BNC = F.avg_pool2d(cover_BCSS, folder.PATCH).flatten(2).transpose(1, 2)
        outlines = F.binary_cross_entropy_with_logits(self.outline(tokens_BND), share_BNC.clamp(0, 1))
        return F.mse_loss(self.restore(tokens_BND), self._target(clean_BSS)), outlines

    @staticmethod
    def _target(clean_BSS: Tensor) -> Tensor:
        image = clean_BSS[:, None]
        blurred = F.avg_pool2d(F.pad(image, (6, 6, 6, 6), mode="replicate"), 13, 1)
        detail = F.unfold(image - blurred, folder.PATCH, stride=folder.PATCH)
        coarse = F.avg_pool2d(image, 4)
        around = F.unfold(F.pad(coarse, (3, 3, 3, 3)), CONTEXT, stride=folder.PATCH // 4)
        return torch.cat([2.5 * detail, around], 1).transpose(1, 2)


def spoil(clean_BSS: Tensor, generator: torch.Generator, missing: float) -> Tensor:
    """Add noise and replace a share of the patches by gray."""
    grid = folder.IMAGE_SIZE // folder.PATCH
    keep = torch.rand(len(clean_BSS), 1, grid, grid, generator=generator) >= missing
    keep_BSS = F.interpolate(keep.float(), scale_factor=folder.PATCH)[:, 0]
    return clean_BSS * keep_BSS + 0.15 * torch.randn(clean_BSS.shape, generator=generator)


def patch_tokens(model, pixels_BSS: Tensor) -> Tensor:
    """Return the tower's patch tokens [B, N, D], the input of the projector."""
    pixels = pixels_BSS[:, None].expand(-1, 3, -1, -1)
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def decode(model, ids_BL: Tensor, tokens_BND: Tensor | None, attend: bool = False):
    """Run the language model: last hidden states [B, L, d] and, if requested, attentions [B, H, L, L] per block."""
    embeds = model.get_input_embeddings()(ids_BL)
    if tokens_BND is not None:
        image = model.model.multi_modal_projector(tokens_BND)
        embeds = embeds.masked_scatter((ids_BL == model.config.image_token_id)[..., None], image)
    mask = (ids_BL != model.config.text_config.pad_token_id).long()
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
    return model.model.language_model(**inputs, output_attentions=attend)


def next_token_loss(model, hidden_BLD: Tensor, labels_BL: Tensor) -> Tensor:
    """Return the mean loss at the labeled positions; logits are computed only there."""
    wanted = labels_BL[:, 1:]
    chosen = wanted != IGNORE
    return F.cross_entropy(model.lm_head(hidden_BLD[:, :-1][chosen]), wanted[chosen])


def pointing_loss(attentions: tuple[Tensor, ...], lesson: Lesson, image_id: int) -> Tensor:
    """Return the cross-entropy of the questions' attention to the patches, in the middle blocks, with their regions."""
    image_BL = lesson.ids_BL == image_id
    known_BT = lesson.where_BTN.sum(-1) > 0
    losses = []
    for attention_BHLL in (attentions[block] for block in POINTING):
        map_BTL = lesson.rows_BTL @ attention_BHLL.mean(1)
        map_BTN = map_BTL.transpose(1, 2)[image_BL].view(len(map_BTL), -1, map_BTL.shape[1]).transpose(1, 2)
        chance_BTN = map_BTN / map_BTN.sum(-1, keepdim=True).clamp_min(1e-6)
        entropy_BT = -(lesson.where_BTN * chance_BTN.clamp_min(1e-6).log()).sum(-1)
        losses.append(entropy_BT[known_BT].mean())
    return torch.stack(losses).mean()


def optimize(parameters: list[nn.Parameter], steps: int, rate: float) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    """Optimize with AdamW, warm-up and a cosine. The caller sets the gradients between two yields."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    for step in range(steps):
        warm = min(1.0, (step + 1) / 60)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.zero_grad(set_to_none=True)
        yield step, optimizer
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def train_tower(model, restorer: Restorer, course: Course, seed: int, steps: int, batch: int) -> dict[str, float]:
    """Step 1: the tower only. Returns the last mean losses."""
    rng, generator = np.random.default_rng([seed, 1]), torch.Generator().manual_seed(seed)
    losses = Running()
    parameters = [*model.model.vision_tower.parameters(), *restorer.parameters()]
    bar = tqdm(optimize(parameters, steps, 2e-3), "restoration", total=steps, mininterval=5)
    for _, _ in bar:
        clean, cover = course.pictures(rng, batch)
        restoration, outlines = restorer(patch_tokens(model, spoil(clean, generator, 0.25)), clean, cover)
        (restoration + OUTLINES * outlines).backward()
        bar.set_postfix_str(losses.add(restoration=restoration, outlines=outlines), refresh=False)
    return losses.value


def train_whole(
    model,
    restorer: Restorer,
    course: Course,
    seed: int,
    steps: int,
    batch: int,
    turns: int,
    unrelated: float,
    point: float,
) -> dict[str, float]:
    """Train steps 2 and 3 together. Returns the last mean losses."""
    rng, generator = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed + 1)
    losses = Running()
    parameters = [*model.parameters(), *restorer.parameters()]
    bar = tqdm(optimize(parameters, steps, 2e-3), "captions", total=steps, mininterval=5)
    for _, _ in bar:
        lesson = course.lesson(rng, batch, turns, unrelated)
        tokens = patch_tokens(model, spoil(lesson.clean_BSS, generator, 0.0))
        terms = lesson_losses(model, course, lesson, tokens, rng)
        restoration, outlines = restorer(tokens, lesson.clean_BSS, lesson.cover_BCSS)
        taught = terms["captions"] + point * terms["pointing"] + 0.3 * terms["reading"]
        (taught + restoration + OUTLINES * outlines).backward()
        bar.set_postfix_str(losses.add(**terms, restoration=restoration, outlines=outlines), refresh=False)
    return losses.value


def lesson_losses(
    model, course: Course, lesson: Lesson, tokens_BND: Tensor, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Return the losses of the language model on one lesson and on a batch of text."""
    decoded = decode(model, lesson.ids_BL, tokens_BND, attend=True)
    ids_BL, labels_BL = course.reading(rng, max(1, len(lesson.ids_BL) // 4), 4)
    return {
        "captions": next_token_loss(model, decoded.last_hidden_state, lesson.labels_BL),
        "pointing": pointing_loss(decoded.attentions, lesson, model.config.image_token_id),
        "reading": next_token_loss(model, decode(model, ids_BL, None).last_hidden_state, labels_BL),
    }


class Running:
    """Exponential means of the losses."""

    def __init__(self) -> None:
        self.value: dict[str, float] = {}

    def add(self, **losses: Tensor) -> str:
        """Add the losses of a step and return the means as text."""
        for name, loss in losses.items():
            self.value[name] = 0.98 * self.value.get(name, loss.item()) + 0.02 * loss.item()
        return " ".join(f"{name} {value:.3f}" for name, value in self.value.items())


@torch.no_grad()
def accuracy(model, course: Course, asked: list[tuple[Tensor, Turn]], batch: int = 64) -> float:
    """Return the exact-match accuracy of greedy answers to (picture [S, S], (question, answer)).

    A greedy answer equals the reference if and only if every token is the most likely one after the reference's tokens.
    """
    right = 0
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        ids_BL, labels_BL = course.pad([course.encode([turn], image=True) for _, turn in part])
        tokens_BND = patch_tokens(model, torch.stack([picture for picture, _ in part]))
        guess_BL = model.lm_head(decode(model, ids_BL, tokens_BND).last_hidden_state[:, :-1]).argmax(-1)
        wanted_BL = labels_BL[:, 1:]
        right += int(((guess_BL == wanted_BL) | (wanted_BL == IGNORE)).all(1).sum())
    return right / len(asked)


def accuracies(model, course: Course, findings: list[tuple[Tensor, Turn]]) -> dict[str, float]:
    """Return the accuracy on questions about shapes and findings, and that of answers without the picture."""
    return {
        "shape_question_accuracy": round(accuracy(model, course, shape_questions(course, 400)), 4),
        "finding_question_accuracy": round(accuracy(model, course, findings), 4),
        "finding_question_blind": round(blind_accuracy(course, findings), 4),
    }


def main(
    output: Path = Path("medalign/assets/phantom_student"),
    results: Path = Path("tools/benchmarks/results/phantom_student.json"),
    seed: int = 0,
    studies: int = 3000,
    tower_steps: int = 600,
    steps: int = 5000,
    batch: int = 24,
    turns: int = 8,
    unrelated: float = 0.1,
    point: float = 0.5,
    width: int = 128,
    blocks: int = 4,
    vocabulary: int = 1500,
):
    """Train and save the base student.

    Args:
        output: folder to write, loadable with AutoModelForImageTextToText and AutoProcessor.
        results: JSON file for losses and accuracies.
        seed: seed of weights, pictures and texts.
        studies: number of radiographs, which are rendered once and used as backgrounds.
        tower_steps: steps with restoration only.
        steps: steps with captions and reading.
        batch: pictures per step.
        turns: questions per picture.
        unrelated: share of conversations with a medical turn about another radiograph.
        point: weight of the loss that directs a question's attention to the shape or place that it asks about.
        width: hidden width of the language model.
        blocks: decoder blocks of the language model.
        vocabulary: number of tokens.
    """
    began = time.perf_counter()
    torch.manual_seed(seed)
    texts = [text for index in range(300) for text in phantom_texts(study(stream(seed + 1, "pretrain"), index))]
    processor = folder.build_processor(folder.build_tokenizer([*texts, *generic_texts(seed)], vocabulary))
    model = folder.build_model(processor.tokenizer, width, blocks)
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in model.model.named_children()}
    print(f"vocabulary {len(processor.tokenizer)}, parameters {sizes}")
    model.set_attn_implementation({"text_config": "eager"})  # its attention weights are trained
    course, restorer = Course(seed, studies, processor), Restorer(folder.TOWER_WIDTH)
    tower = train_tower(model, restorer, course, seed, tower_steps, batch)
    losses = {f"tower_{name}": value for name, value in tower.items()}
    losses |= train_whole(model, restorer, course, seed, steps, batch, turns, unrelated, point)
    record = {
        "command": shlex.join(["python", "-m", "tools.phantom_models.train_student", *sys.argv[1:]]),
        "seconds": round(time.perf_counter() - began),
        "folder_bytes": folder.save(model, processor, output),
        "parameters": sizes,
        "losses": {name: round(value, 4) for name, value in losses.items()},
    } | accuracies(model, course, finding_questions(seed, 250))
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
