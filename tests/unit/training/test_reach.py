"""Each loss reaches the parameters that it should, and no others."""

from __future__ import annotations

import pytest
import torch

from medalign.config import LoraConfig, LossConfig, StudentConfig
from medalign.geometry import PatchGrid
from medalign.losses import Objective, build_terms
from medalign.student.loading import load_student
from medalign.teacher.loading import load_teacher
from medalign.teacher.targets import teacher_targets
from tests import tiny


@pytest.fixture(scope="module")
def reached(student_folder, teacher_folder):
    """For each loss on its own, the names of the parameters with a gradient that is not zero. The tapped block is 1."""
    config = StudentConfig(path=str(student_folder), layer=1, lora=LoraConfig(rank=4), train_projector=True)
    teacher = load_teacher(teacher_folder)
    batch = tiny.batch()
    targets = teacher_targets(teacher, torch.nn.functional.interpolate(batch.teacher_pixels, size=48), PatchGrid(4, 4))
    names = {}
    for term in ("language", "similarity", "attention"):
        student = load_student(config, torch.float32).train()
        torch.manual_seed(1)
        for _, parameter in student.trainable()["adapters"] + student.trainable()["steering"]:
            torch.nn.init.normal_(parameter, std=0.1)
        report = Objective(build_terms(LossConfig(beta=1.0)))(
            student(batch), targets, batch, dict.fromkeys(("language", "similarity", "attention"), 1.0)
        )
        report.terms[term].sum.backward()
        names[term] = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert all(p.grad is None for p in student.parameters() if not p.requires_grad)
        assert all(p.grad is None for p in teacher.parameters())
    return names


def adapters(names: set[str], block: int) -> set[str]:
    """The linear layers of a block that have an adapter among `names`."""
    return {name.split(".lora_")[0].split(".")[-1] for name in names if f".layers.{block}." in name}


ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_language_reaches_everything_that_learns(reached):
    assert [adapters(reached["language"], block) for block in range(3)] == [ALL, ALL, ALL]
    assert "steering.weight" in reached["language"]
    assert any("multi_modal_projector" in name for name in reached["language"])


def test_similarity_ends_at_the_input_of_the_tapped_block(reached):
    names = reached["similarity"]
    assert adapters(names, 0) == ALL
    assert adapters(names, 1) == adapters(names, 2) == set()
    assert "steering.weight" in names and any("multi_modal_projector" in name for name in names)


def test_attention_ends_at_query_and_key_of_the_tapped_block(reached):
    names = reached["attention"]
    assert adapters(names, 0) == ALL
    assert adapters(names, 1) == {"q_proj", "k_proj"}
    assert adapters(names, 2) == set()
    assert "steering.weight" in names


def test_the_vision_tower_is_never_reached(reached):
    assert not any("vision_tower" in name for names in reached.values() for name in names)
