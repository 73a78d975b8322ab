"""A small student of a family, loaded twice, and questions with one image, two and none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from medalign.contracts import Batch, Sample
from medalign.data.batches.collator import Collator
from medalign.decoding.base import Decoding, Method
from medalign.pipeline import build_question_collator
from medalign.student.loading import load_processor, load_student
from medalign.student.model import Student
from tests.unit.student.families.cases import CASES

LIMIT = 6


@dataclass
class Asked:
    """The same student with SDPA and with eager attention, and the questions."""

    student: Student
    eager: Student
    collate: Collator
    batch: Batch

    @classmethod
    def of(cls, name: str, folder: Path) -> Asked:
        """Save a student of a family and load it."""
        case = CASES[name]
        config = case.config(case.save(folder / name))
        students = [load_student(replace(config, attention=kind), torch.float32).eval() for kind in ("sdpa", "eager")]
        for student in students:
            torch.manual_seed(0)
            torch.nn.init.normal_(student.steering.weight, std=0.3)
        gray = [Image.linear_gradient("L").resize((40, 20)), Image.radial_gradient("L").resize((32, 32))]
        samples = [
            Sample(f"s{count}", "shard", "vqa", "Is it?" * (count + 1), "No.", "open", tuple(gray[:count]))
            for count in (1, 2, 0)
        ]
        collate = build_question_collator(students[0].spec, load_processor(config), 400, 2)
        return cls(*students, collate, collate(samples))

    def generate(self, method: Method, batch: Batch, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Generate as `Method.generate` does."""
        ends = self.student.end_tokens
        return method.generate(self.student, batch, Decoding(LIMIT, **settings), pad_token_id=0, eos_token_id=ends)

    def answers(self, method: Method) -> list[list[int]]:
        """The tokens of each answer, the end token included."""
        ids, ends = self.generate(method, self.batch)[0], self.student.end_tokens
        rows = [[*row, ends[0]] for row in ids.tolist()]
        ended = [next(place for place, token in enumerate(row) if token in ends) for row in rows]
        return [row[: place + 1][:LIMIT] for row, place in zip(rows, ended, strict=True)]

    def require_equal_beams(self, method: Method) -> None:
        """Two beams of each sample in the batch give what they give for the sample by itself."""
        ids, _ = self.generate(method, self.batch, num_beams=2)
        for row in range(3):
            single, _ = self.generate(method, self.batch.sample(row), num_beams=2)
            length = single.shape[1]
            assert ids[row, :length].tolist() == single[0].tolist() and not ids[row, length:].any()
