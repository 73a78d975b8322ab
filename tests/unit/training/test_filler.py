"""A rank without a sample of its own runs a batch that reaches every weight with gradient zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from medalign.config import LoraConfig, LossConfig, StudentConfig
from medalign.contracts import IGNORE
from medalign.geometry import PatchGrid
from medalign.losses import Objective, build_terms
from medalign.student.loading import load_student
from medalign.teacher.loading import load_teacher
from medalign.teacher.targets import teacher_targets
from tests import tiny


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_nothing_supervised_and_no_image(student_folder, teacher_folder, coefficient: float) -> None:
    config = StudentConfig(path=str(student_folder), layer=1, lora=LoraConfig(rank=4), train_projector=True)
    student = load_student(config, torch.float32).train()
    batch = tiny.batch(texts=((1, 1),), images=False)
    batch = replace(batch, labels=torch.full_like(batch.labels, IGNORE), keys=())
    objective = Objective(build_terms(LossConfig(alpha=coefficient, beta=coefficient)))
    assert {name: float(count) for name, count in objective.counts(batch).items()} == {
        "language": 0,
        "similarity": 0,
        "attention": 0,
    }
    targets = None
    if coefficient:
        pixels = torch.nn.functional.interpolate(batch.teacher_pixels, size=48)
        targets = teacher_targets(load_teacher(teacher_folder), pixels, PatchGrid(4, 4))
    output = student(batch, tap=bool(coefficient))
    report = objective(output, targets, batch, dict.fromkeys(("language", "similarity", "attention"), 1.0))
    assert float(report.total.detach()) == 0
    report.total.backward()
    gradients = [p.grad for p in student.parameters() if p.requires_grad and p.grad is not None]
    assert all((gradient == 0).all() for gradient in gradients)
    assert gradients  # the graph is whole: ZeRO-3 reduces what the other ranks reduce
