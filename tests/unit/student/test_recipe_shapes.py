"""A training step of every recipe on the meta device, at the real size of its student and its teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from medalign.config import Config
from medalign.losses.build import build_objective
from medalign.planning.shapes import student_on_meta, teacher_on_meta
from medalign.student.model import Student, require_layer
from medalign.teacher.model import Teacher
from medalign.teacher.targets import teacher_targets
from tests.meta import batch_on_meta, on_meta
from tools.benchmarks import recipe_memory
from tools.benchmarks.recipe_memory import RECIPES, STUDENTS, student_name, teacher_name

WIDTH = {"unimed_l14": 1024, "unimed_b16": 768, "biomedclip": 768}
WHOLE = tuple(f"{student}/vqa_rad" for student in STUDENTS)
ROOM = 256  # tokens of text beside the image that every recipe must leave
QUESTION = 20


def load(recipe: str) -> Config:
    """Recomputing blocks changes no shape and would double the time."""
    return recipe_memory.load(recipe, "--student.gradient_checkpointing", "false")


def shape_settings(recipe: str) -> tuple[Any, ...]:
    """What decides the shapes of a step: which block is tapped does not, and which losses there are does."""
    settings = load(recipe)
    losses = (settings.losses.alpha > 0, settings.losses.beta > 0, settings.losses.weighting)
    return student_settings(settings), losses, teacher_name(recipe), settings.train.micro_batch_size, settings.data


def student_settings(settings: Config) -> str:
    """The student without the choice of its tapped block, and without that of a mixture that it does not have."""
    form = settings.student.query_mixture_form if settings.student.query_mixture else "beside_lora"
    return str(replace(settings.student, layer=1, query_mixture_form=form))


def groups() -> list[list[str]]:
    """Group the recipes by the settings that decide shapes. The first of each group is run."""
    found: list[list[str]] = []
    for recipe in sorted(RECIPES, key=lambda name: name not in WHOLE):
        same = next((group for group in found if shape_settings(group[0]) == shape_settings(recipe)), None)
        if same is None:
            found.append([recipe])
        else:
            same.append(recipe)
    return found


GROUPS = groups()
_BUILT: dict[str, Student] = {}


def build(recipe: str) -> Student:
    """Build a recipe's student on the meta device; one for all recipes that differ only in the tapped block."""
    settings = load(recipe)
    key = student_settings(settings)
    if key not in _BUILT:
        _BUILT[key] = student_on_meta(settings.student, torch.bfloat16)
        tower: Any = _BUILT[key].spec.vision_tower
        if hasattr(tower, "fullatt_block_indexes"):  # windows change no shape, and are thousands of calls
            tower.fullatt_block_indexes = range(len(tower.blocks))
    return _BUILT[key]


@contextmanager
def only_near_the_tapped_block(student: Student) -> Iterator[None]:
    """Let the other blocks return their input: they repeat the shapes of those near the tapped one."""
    with pytest.MonkeyPatch.context() as patch:
        for place, block in enumerate(student.spec.blocks):
            if abs(place - student.layer) > 1:
                patch.setattr(block, "forward", lambda hidden_states, *_, **__: hidden_states)
        yield


def step(recipe: str, student: Student) -> dict[str, tuple[int, ...]]:
    """Run a forward and a backward pass with the recipe's losses; return the shapes of what the losses get."""
    settings, spec = load(recipe), student.spec
    tower = teacher_on_meta(settings, torch.bfloat16)
    samples, length = settings.train.micro_batch_size, settings.data.max_length
    batch = batch_on_meta(spec, samples, length, tower.image_size if tower else 1, question=QUESTION)
    objective = build_objective(settings)
    student.zero_grad()
    with on_meta():
        targets = None
        if tower is not None:
            targets = teacher_targets(Teacher(tower, (0.5,) * 3, (0.5,) * 3), batch.teacher_pixels, spec.grid)
        output = student(batch)
        report = objective(output, targets, batch, dict.fromkeys(objective.counts(batch), 1.0))
        report.total.backward()
    assert set(report.terms) == ({"language"} if targets is None else {"language", "similarity", "attention"})
    found = {name: getattr(output, name) for name in ("logits", "kept", "tokens", "attention")}
    if targets is not None:
        found |= {"features": targets.features, "target": targets.attention}
    assert {tensor.device.type for name, tensor in found.items() if name != "kept"} == {"meta"}
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def expected(recipe: str, student: Student) -> dict[str, tuple[int, ...]]:
    settings, spec = load(recipe), student.spec
    samples, cells = settings.train.micro_batch_size, spec.grid.size
    answer = settings.data.max_length - spec.image.count - QUESTION - 10
    vocabulary = spec.model.get_input_embeddings().weight.shape[0]
    shapes = {"logits": (samples, answer, vocabulary), "kept": (answer,)}
    shapes |= {"tokens": (samples, cells, spec.width), "attention": (samples, cells)}
    if settings.distils:
        shapes |= {"features": (samples, cells, WIDTH[teacher_name(recipe)]), "target": (samples, cells)}
    return shapes


def without_gradient(student: Student) -> list[str]:
    return [name for group in student.trainable().values() for name, p in group if p.grad is None]


@pytest.mark.parametrize("recipe", WHOLE)
def test_a_whole_step_reaches_every_trained_weight(recipe):
    student = build(recipe)
    assert step(recipe, student) == expected(recipe, student)
    assert without_gradient(student) == []


@pytest.mark.parametrize("recipe", [group[0] for group in GROUPS if group[0] not in WHOLE])
def test_a_step_near_the_tapped_block(recipe):
    student = build(recipe)
    with only_near_the_tapped_block(student):
        assert step(recipe, student) == expected(recipe, student)
    near = tuple(f"layers.{student.layer + shift}." for shift in (-1, 0, 1))
    missed = [name for name in without_gradient(student) if "layers." not in name or any(n in name for n in near)]
    assert missed == []


def test_every_recipe_has_the_shapes_of_one_that_is_run():
    assert sorted(name for group in GROUPS for name in group) == sorted(RECIPES)
    (group,) = (group for group in GROUPS if group[0] == "llava_med/vqa_rad")
    assert {"llava_vqa", "official/vqa_rad", "ablations/layer_31", "llava_med/slake"} <= set(group)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_tapped_block_sees_the_image_and_a_sample_has_room_for_text(recipe):
    settings, spec = load(recipe), build(f"{student_name(recipe)}/vqa_rad").spec
    require_layer(settings.student.layer, spec)
    assert spec.window(settings.student.layer) is None
    assert spec.image.count + ROOM <= settings.data.max_length
