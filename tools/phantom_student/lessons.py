"""The base student's lessons: radiographs, scenes and conversations, turned into tensors.

Shapes: B samples, L tokens, P radiographs, S pixels of a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from phantom_student import folder
from phantom_student.pictures import Pool, Turn, fit, scene
from torch import Tensor
from tqdm import tqdm

from medalign.contracts import IGNORE
from medalign.data.phantom import Study, stream, study
from medalign.geometry import CanvasFrame, square_canvas, view

REPORT_REQUESTS = (
    "Describe the findings.",
    "Write a report of this radiograph.",
    "Write the findings of this chest film.",
    "Report this image.",
)
TOKENS = (folder.IMAGE_SIZE // folder.PATCH) ** 2


@dataclass
class Lesson:
    """One batch: pictures and the conversations about them."""

    clean_BSS: Tensor
    cover_BCSS: Tensor  # what each kind and tone of shape covers
    ids_BL: Tensor
    labels_BL: Tensor


class Course:
    """Makes lessons, each from a random generator alone, so that a seed gives one course."""

    def __init__(self, seed: int, studies: int, processor):
        self.tokenizer = processor.tokenizer
        self.readings: list[tuple[str, list[Turn]]] = []
        canvases, frames = [], []
        for index in tqdm(range(studies), "rendering radiographs", mininterval=5):
            made: Study = study(stream(seed, "pretrain"), index)
            canvas, frame = fit(made.image, folder.IMAGE_SIZE)
            canvases.append(canvas)
            frames.append(frame)
            self.readings.append((made.report, [(q.question, q.answer) for q in made.questions]))
        self.pool = Pool(np.stack(canvases), frames)

    def pictures(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Clean pictures [B, S, S], normalised, and the cover of their shapes [B, C, S, S]."""
        scenes = [scene(rng, self.pool) for _ in range(count)]
        cover = torch.from_numpy(np.stack([made.cover for made in scenes]))
        return normalise(np.stack([made.picture for made in scenes])), cover

    def medical_turn(self, rng: np.random.Generator) -> Turn:
        """A question or report request about some radiograph, without the radiograph."""
        report, questions = self.readings[rng.integers(len(self.readings))]
        if rng.uniform() < 0.2:
            return REPORT_REQUESTS[rng.integers(len(REPORT_REQUESTS))], report
        return questions[rng.integers(len(questions))]

    def lesson(self, rng: np.random.Generator, count: int, turns: int, unrelated: float) -> Lesson:
        """Conversations about `count` scenes; a share of them gets one medical turn that has nothing to do with it."""
        scenes, rows = [scene(rng, self.pool) for _ in range(count)], []
        for made in scenes:
            asked = made.turns[:turns]
            if rng.uniform() < unrelated:
                asked.insert(rng.integers(len(asked) + 1), self.medical_turn(rng))
            rows.append(self.encode(asked, image=True))
        cover = torch.from_numpy(np.stack([made.cover for made in scenes]))
        return Lesson(normalise(np.stack([made.picture for made in scenes])), cover, *self.pad(rows))

    def reading(self, rng: np.random.Generator, count: int, turns: int) -> tuple[Tensor, Tensor]:
        """Text alone: medical conversations in which every word counts."""
        rows = []
        for _ in range(count):
            ids, _ = self.encode([self.medical_turn(rng) for _ in range(turns)], image=False)
            rows.append((ids, [IGNORE, *ids[1:]]))
        return self.pad(rows)

    def encode(self, turns: list[Turn], image: bool) -> tuple[list[int], list[int]]:
        ids, labels = [self.tokenizer.bos_token_id], [IGNORE]
        for number, (question, answer) in enumerate(turns):
            opening = folder.IMAGE * TOKENS + "\n" if image and number == 0 else ""
            prompt = self.tokenizer.encode(f"USER: {opening}{question} ASSISTANT:", add_special_tokens=False)
            reply = self.tokenizer.encode(f" {answer}{folder.EOS}", add_special_tokens=False)
            ids += prompt + reply
            labels += [IGNORE] * len(prompt) + reply
        return ids, labels

    def pad(self, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids_BL = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
        labels_BL = torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in rows])
        return ids_BL, labels_BL


def normalise(pictures: np.ndarray) -> Tensor:
    """Grey levels in [0, 1], [B, S, S], as the tower wants them (one of three equal channels)."""
    return (torch.from_numpy(pictures.astype(np.float32)) - folder.MEAN[0]) / folder.STD[0]


def finding_questions(seed: int, studies: int) -> list[tuple[Tensor, Turn]]:
    """Every question about radiographs that no one was trained on."""
    asked = []
    for index in range(studies):
        made = study(stream(seed, "test"), index)
        pixels = view(square_canvas(made.image), folder.IMAGE_SIZE, folder.MEAN, folder.STD)
        asked += [(pixels[0], (question.question, question.answer)) for question in made.questions]
    return asked


def shape_questions(course: Course, count: int) -> list[tuple[Tensor, Turn]]:
    """Short questions about new scenes."""
    rng, asked = np.random.default_rng([9, 9]), []
    while len(asked) < count:
        made = scene(rng, course.pool)
        short = [turn for turn in made.turns if not turn[0].startswith("Describe")]
        asked.append((normalise(made.picture[None])[0], short[0]))
    return asked


def phantom_texts(made: Study) -> list[str]:
    return [made.report, *(f"{question.question} {question.answer}" for question in made.questions)]


def generic_texts(seed: int) -> list[str]:
    rng = np.random.default_rng([seed, 3])
    blank = Pool(np.zeros((1, folder.IMAGE_SIZE, folder.IMAGE_SIZE), np.uint8), [CanvasFrame(1, 1)])
    return [f"{question} {answer}" for _ in range(200) for question, answer in scene(rng, blank).turns]
