"""The base student's lessons: radiographs, scenes and conversations, converted to tensors.

Shapes: B samples, L tokens, T turns, N patches, P radiographs, S pixels of a side.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from medalign.contracts import IGNORE
from medalign.geometry import CanvasFrame, PreprocessCfg, square_canvas
from medalign.phantom import Study, stream, study
from tools.phantom_models.student import folder
from tools.phantom_models.student.pictures import Pool, Turn, fit, scene

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
    cover_BCSS: Tensor  # coverage by each kind and tone of shape
    ids_BL: Tensor
    labels_BL: Tensor
    rows_BTL: Tensor  # the mean over each question's tokens, as weights
    where_BTN: Tensor  # the share of each patch in the region of the question; sums to one, or zero if unknown


class Encoded(NamedTuple):
    """One conversation as tokens; `questions` contains the half-open range of each question."""

    ids: list[int]
    labels: list[int]
    questions: list[tuple[int, int]]


class Course:
    """Makes lessons. Each depends only on a random generator, so that a seed determines the course."""

    def __init__(self, seed: int, studies: int, processor):
        self.tokenizer = processor.tokenizer
        self.readings: list[tuple[str, list[Turn]]] = []
        canvases, frames = [], []
        for index in tqdm(range(studies), "rendering radiographs", mininterval=5):
            made: Study = study(stream(seed, "pretrain"), index)
            canvas, frame = fit(made.image, folder.IMAGE_SIZE)
            canvases.append(canvas)
            frames.append(frame)
            self.readings.append((made.report, [Turn(q.question, q.answer) for q in made.questions]))
        self.pool = Pool(np.stack(canvases), frames)

    def pictures(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Make clean pictures [B, S, S], normalized, and the coverage by their shapes [B, C, S, S]."""
        scenes = [scene(rng, self.pool) for _ in range(count)]
        cover = torch.from_numpy(np.stack([made.cover for made in scenes]))
        return normalize(np.stack([made.picture for made in scenes])), cover

    def medical_turn(self, rng: np.random.Generator) -> Turn:
        """Draw a question or report request about a radiograph, without the radiograph."""
        report, questions = self.readings[rng.integers(len(self.readings))]
        if rng.uniform() < 0.2:
            return Turn(REPORT_REQUESTS[rng.integers(len(REPORT_REQUESTS))], report)
        return questions[rng.integers(len(questions))]

    def lesson(self, rng: np.random.Generator, count: int, turns: int, unrelated: float) -> Lesson:
        """Make conversations about `count` scenes. A share of them gets one medical turn unrelated to the scene."""
        scenes = [scene(rng, self.pool) for _ in range(count)]
        talks = [made.turns[:turns] for made in scenes]
        for talk in talks:
            if rng.uniform() < unrelated:
                talk.insert(rng.integers(len(talk) + 1), self.medical_turn(rng))
        encoded = [self.encode(talk, image=True) for talk in talks]
        ids_BL, labels_BL = self.pad(encoded)
        cover = torch.from_numpy(np.stack([made.cover for made in scenes]))
        pictures = normalize(np.stack([made.picture for made in scenes]))
        return Lesson(pictures, cover, ids_BL, labels_BL, *self._ground(talks, encoded, ids_BL.shape[1]))

    def _ground(self, talks: list[list[Turn]], encoded: list[Encoded], length: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of each question and its region: `Lesson.rows_BTL` and `where_BTN`."""
        most = max(map(len, talks))
        rows_BTL, where_BTN = torch.zeros(len(talks), most, length), torch.zeros(len(talks), most, TOKENS)
        for b, (talk, code) in enumerate(zip(talks, encoded, strict=True)):
            for t, (turn, (start, end)) in enumerate(zip(talk, code.questions, strict=True)):
                if turn.region is not None:
                    share = F.avg_pool2d(torch.from_numpy(turn.region)[None], folder.PATCH).flatten()
                    rows_BTL[b, t, start:end] = 1 / (end - start)
                    where_BTN[b, t] = share / share.sum().clamp_min(1e-6)
        return rows_BTL, where_BTN

    def reading(self, rng: np.random.Generator, count: int, turns: int) -> tuple[Tensor, Tensor]:
        """Make medical conversations without pictures, in which every token is supervised."""
        rows = [self.encode([self.medical_turn(rng) for _ in range(turns)], image=False) for _ in range(count)]
        return self.pad([row._replace(labels=[IGNORE, *row.ids[1:]]) for row in rows])

    def encode(self, turns: list[Turn], image: bool) -> Encoded:
        """Convert a conversation to tokens. The answers are supervised."""
        ids, labels, questions = [self.tokenizer.bos_token_id], [IGNORE], []
        for number, turn in enumerate(turns):
            opening = folder.IMAGE * TOKENS + "\n" if image and number == 0 else ""
            # A space is part of the token of the next word.
            lead = self.tokenizer.encode(f"USER: {opening}".rstrip(" "), add_special_tokens=False)
            prompt = self.tokenizer.encode(f"USER: {opening}{turn.question} ASSISTANT:", add_special_tokens=False)
            reply = self.tokenizer.encode(f" {turn.answer}{folder.EOS}", add_special_tokens=False)
            questions.append((len(ids) + len(lead), len(ids) + len(prompt)))
            ids += prompt + reply
            labels += [IGNORE] * len(prompt) + reply
        return Encoded(ids, labels, questions)

    def pad(self, rows: list[Encoded]) -> tuple[Tensor, Tensor]:
        """Pad conversations to one length: ids and labels, [B, L]."""
        length = max(len(row.ids) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids_BL = torch.tensor([row.ids + [pad] * (length - len(row.ids)) for row in rows])
        labels_BL = torch.tensor([row.labels + [IGNORE] * (length - len(row.labels)) for row in rows])
        return ids_BL, labels_BL


def normalize(pictures: np.ndarray) -> Tensor:
    """Normalize gray levels in [0, 1], [B, S, S], for the tower (one of three equal channels)."""
    return (torch.from_numpy(pictures.astype(np.float32)) - folder.MEAN[0]) / folder.STD[0]


def finding_questions(seed: int, studies: int) -> list[tuple[Tensor, Turn]]:
    """Return every question about radiographs of the test split."""
    asked = []
    for index in range(studies):
        made = study(stream(seed, "test"), index)
        pixels = PreprocessCfg(folder.IMAGE_SIZE, folder.MEAN, folder.STD).view(square_canvas(made.image))
        asked += [(pixels[0], Turn(question.question, question.answer)) for question in made.questions]
    return asked


def blind_accuracy(course: Course, asked: list[tuple[Tensor, Turn]]) -> float:
    """Return the score of the most common answer to each question, which needs no picture."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for _, questions in course.readings:
        for turn in questions:
            seen[turn.question][turn.answer] += 1
    commonest = {question: answers.most_common(1)[0][0] for question, answers in seen.items()}
    return sum(commonest.get(turn.question) == turn.answer for _, turn in asked) / len(asked)


def shape_questions(course: Course, count: int) -> list[tuple[Tensor, Turn]]:
    """Return short questions about new scenes."""
    rng = np.random.default_rng([9, 9])
    asked: list[tuple[Tensor, Turn]] = []
    while len(asked) < count:
        made = scene(rng, course.pool)
        short = [turn for turn in made.turns if not turn.question.startswith("Describe")]
        asked.append((normalize(made.picture[None])[0], short[0]))
    return asked


def phantom_texts(made: Study) -> list[str]:
    """Return the report of a study, and its questions with their answers."""
    return [made.report, *(f"{question.question} {question.answer}" for question in made.questions)]


def generic_texts(seed: int) -> list[str]:
    """Return questions about scenes with their answers."""
    rng = np.random.default_rng([seed, 3])
    blank = Pool(np.zeros((1, folder.IMAGE_SIZE, folder.IMAGE_SIZE), np.uint8), [CanvasFrame(1, 1)])
    return [f"{turn.question} {turn.answer}" for _ in range(200) for turn in scene(rng, blank).turns]
