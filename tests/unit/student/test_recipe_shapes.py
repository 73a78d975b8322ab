"""A training step of every recipe on the meta device, at the real size of its student and its teacher."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from medalign import config
from medalign.config import Config, StudentConfig
from medalign.losses.build import build_objective
from medalign.planning.shapes import student_on_meta, teacher_on_meta
from medalign.student.model import Student
from medalign.teacher.model import Teacher
from medalign.teacher.targets import teacher_targets
from tests.meta import batch_on_meta, on_meta

CONFIGS = Path(__file__).parents[3] / "tools" / "model_configs"
STUDENTS = ("llava_med", "huatuo", "lingshu", "qwen3_vl", "medgemma")
WHOLE = tuple(f"{student}/vqa_rad" for student in STUDENTS)
TEACHERS = {"ablations/teacher_unimed_b16": "unimed_b16", "ablations/teacher_biomedclip": "biomedclip"}
WIDTH = {"unimed_l14": 1024, "unimed_b16": 768, "biomedclip": 768}
ROOM = 256  # tokens of text beside the image that every recipe must leave


def load(recipe: str) -> Config:
    student = folder if (folder := recipe.partition("/")[0]) in STUDENTS else "llava_med"
    teacher = TEACHERS.get(recipe, "unimed_l14")
    return config.load(
        recipe, ["--student.path", str(CONFIGS / student), "--teacher.path", str(CONFIGS / teacher)], data=False
    )


@functools.cache
def built(settings: str) -> Student:
    """Build a student on the meta device; one for all recipes with the same settings of the student."""
    found = STUDENT_SETTINGS[settings]
    student = student_on_meta(found, torch.bfloat16)
    tower = student.spec.vision_tower
    if hasattr(tower, "fullatt_block_indexes"):  # windows change no shape, and are thousands of calls
        tower.fullatt_block_indexes = range(len(tower.blocks))
    return student


STUDENT_SETTINGS: dict[str, StudentConfig] = {}


def student_of(settings: Config) -> Student:
    STUDENT_SETTINGS[str(settings.student)] = settings.student
    return built(str(settings.student))


@contextmanager
def only_near_the_tapped_block(student: Student) -> Iterator[None]:
    """Let the other blocks return their input: they repeat the shapes of those near the tapped one."""
    far = [block for place, block in enumerate(student.spec.blocks) if abs(place - student.layer) > 1]
    with pytest.MonkeyPatch.context() as patch:
        for block in far:
            patch.setattr(block, "forward", lambda hidden_states, *_, **__: hidden_states)
        yield


def step(settings: Config, student: Student) -> dict[str, tuple[int, ...]]:
    """Run a forward and a backward pass; return the shapes of what the losses get."""
    tower = teacher_on_meta(settings, torch.bfloat16)
    size = tower.image_size if tower else 1
    batch = batch_on_meta(student.spec, settings.train.micro_batch_size, settings.data.max_length, size)
    objective = build_objective(settings)
    student.zero_grad()
    with on_meta():
        targets = None
        if tower is not None:
            teacher = Teacher(tower, (0.5,) * 3, (0.5,) * 3)
            targets = teacher_targets(teacher, batch.teacher_pixels, student.spec.grid)
        output = student(batch)
        report = objective(output, targets, batch, dict.fromkeys(objective.counts(batch), 1.0))
        report.total.backward()
    shapes = {name: tuple(value.shape) for name, value in output._asdict().items()}
    if targets is not None:
        shapes |= {"features": tuple(targets.features.shape), "target": tuple(targets.attention.shape)}
    assert report.total.shape == ()
    assert set(report.terms) == ({"language"} if targets is None else {"language", "similarity", "attention"})
    return shapes


def expected(recipe: str, settings: Config, student: Student) -> dict[str, tuple[int, ...]]:
    batch, spec = settings.train.micro_batch_size, student.spec
    kept = settings.data.max_length - spec.image.count - 10 - 20
    vocabulary = spec.model.get_input_embeddings().weight.shape[0]
    shapes = {
        "logits": (batch, kept, vocabulary),
        "kept": (kept,),
        "tokens": (batch, spec.grid.size, spec.width),
        "attention": (batch, spec.grid.size),
    }
    if settings.distils:
        width = WIDTH[TEACHERS.get(recipe, "unimed_l14")]
        shapes |= {"features": (batch, spec.grid.size, width), "target": (batch, spec.grid.size)}
    return shapes


def without_gradient(student: Student) -> list[str]:
    return [name for group in student.trainable().values() for name, p in group if p.grad is None]


@pytest.mark.parametrize("recipe", WHOLE)
def test_a_whole_step_reaches_every_trained_weight(recipe):
    settings = load(recipe)
    student = student_of(settings)
    assert settings.data.max_length >= student.spec.image.count + ROOM
    assert student.spec.window(settings.student.layer) is None
    assert step(settings, student) == expected(recipe, settings, student)
    assert without_gradient(student) == []


def shape_settings(recipe: str) -> str:
    """Return the settings of a recipe that decide shapes."""
    values = asdict(load(recipe))
    train, data = values["train"]["micro_batch_size"], values["data"]["max_length"]
    losses = values["losses"] | {name: values["losses"][name] > 0 for name in ("alpha", "beta")}
    return str((values["student"], values["teacher"], losses, train, data))


def groups() -> dict[str, list[str]]:
    """Group the recipes by the settings that decide shapes."""
    found: dict[str, list[str]] = {}
    for recipe in (*WHOLE, *(name for name in config.recipes() if name not in (*WHOLE, "phantom"))):
        found.setdefault(shape_settings(recipe), []).append(recipe)
    return found


GROUPS = list(groups().values())


def test_every_recipe_has_the_shapes_of_one_that_is_run():
    assert sorted(name for group in GROUPS for name in group) == sorted(set(config.recipes()) - {"phantom"})
    assert GROUPS[0][:2] == ["llava_med/vqa_rad", "llava_vqa"]


@pytest.mark.parametrize("recipe", [group[0] for group in GROUPS if group[0] not in WHOLE])
def test_a_step_near_the_tapped_block(recipe):
    settings = load(recipe)
    student = student_of(settings)
    with only_near_the_tapped_block(student):
        assert step(settings, student) == expected(recipe, settings, student)
    near = [f"layers.{student.layer + shift}." for shift in (-1, 0, 1)]
    missed = [name for name in without_gradient(student) if "layers." not in name or any(n in name for n in near)]
    assert missed == []
