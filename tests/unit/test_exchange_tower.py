"""A student with a teacher's tower: it sees the teacher's features, and learns with a new projector."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

from medalign.config import StudentConfig
from medalign.student.checks import check_student
from medalign.student.loading import load_processor, load_student
from medalign.student.model import Student
from medalign.teacher.loading import load_teacher, read_preprocess_cfg
from medalign.teacher.source import find_teacher
from medalign.teacher.towers import tower_class
from tests import tiny
from tests.unit.student.families import authors
from tests.unit.teacher.towers.cases import CASES, MEAN, SIZE, write_open_clip
from tools import teacher_towers
from tools.benchmarks.recipe_memory import CONFIGS
from tools.exchange_tower import exchange, main

BY_NAME = {case.name: case for case in CASES}
FITTING = (
    "open_clip",
    "timm (BiomedCLIP)",
    "transformers CLIP",
    "transformers CLIP vision model",
    "transformers SigLIP (MedSigLIP)",
    "transformers SigLIP vision model",
    "transformers DINOv2 (RAD-DINO)",
)
REFUSED = {
    "open_clip ResNet (PubMedCLIP RN50)": "its tower (kind 'resnet') has no class token",
    "timm with registers, norms of queries and keys, layer scale": "its weights do not fit Dinov2Model: 13 unexpected",
    "timm (SigLIP)": "its tower (kind 'timm') has no class token",
}
FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def words(student: Path, teacher: Path | str, output: Path, *more: str) -> list[str]:
    return ["--student", str(student), "--teacher", str(teacher), "--output", str(output), *more]


def load(folder: Path) -> Student:
    config = StudentConfig(path=str(folder), layer=1, steering=False, train_projector=True)
    return load_student(config, torch.float32).train()


def seen_by_the_projector(student: Student, pixels: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = student.spec.projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    student.spec.family.features(student.spec, pixels)
    handle.remove()
    return seen[0]


def pixels_of(size: int = SIZE) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def require_same_features(folder: Path, teacher: str | Path, **colors: Any) -> None:
    student, frozen = load(folder), load_teacher(teacher, features="before_norm", **colors)
    with torch.no_grad():
        found, wanted = seen_by_the_projector(student, pixels_of()), frozen(pixels_of())[0]
    assert (student.spec.grid, student.spec.image_size) == (frozen.grid, frozen.view.size)
    # Fused and unfused attention add in another order: some float32 roundings, relative to the largest value.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    view = student.spec.preprocess_cfg(load_processor(StudentConfig(path=str(folder), layer=1)))
    assert view == read_preprocess_cfg(teacher, **colors)


@pytest.mark.parametrize("name", FITTING)
def test_the_student_sees_the_features_of_its_teacher(name: str, student_folder: Path, tmp_path: Path) -> None:
    BY_NAME[name].write(tmp_path / "teacher")
    assert main(words(student_folder, tmp_path / "teacher", tmp_path / "out")) == 0
    require_same_features(tmp_path / "out", tmp_path / "teacher")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_every_other_kind_is_refused_by_name(student_folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert {*FITTING, *REFUSED} == set(BY_NAME)
    for number, (name, message) in enumerate(REFUSED.items()):
        BY_NAME[name].write(tmp_path / str(number))
        assert main(words(student_folder, tmp_path / str(number), tmp_path / "out")) == 2
        assert f"cannot be the vision tower of LLaVA: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def unimed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with quick GELU."""
    folder = tmp_path_factory.mktemp("teacher") / "unimed"
    vision = {"image_size": SIZE, "patch_size": 8, "width": 24, "head_width": 8, "layers": 3}
    write_open_clip(folder, vision)
    path = folder / "open_clip_config.json"
    values = json.loads(path.read_text())
    values["model_cfg"]["quick_gelu"] = True
    path.write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def exchanged(unimed: Path, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "exchanged"
    assert main(words(student_folder, unimed, folder, "--teacher.mean", *map(str, MEAN))) == 0
    return folder


def test_the_activation_is_that_of_the_teacher(exchanged: Path, unimed: Path) -> None:
    assert json.loads((exchanged / "config.json").read_text())["vision_config"]["hidden_act"] == "quick_gelu"
    require_same_features(exchanged, unimed)


def test_a_tower_with_other_features_is_refused(
    unimed: Path, student_folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    real = teacher_towers._clip_config

    def exact(*arguments: Any) -> CLIPVisionConfig:
        config = real(*arguments)
        config.hidden_act = "gelu"
        return config

    monkeypatch.setattr(teacher_towers, "_clip_config", exact)
    assert main(words(student_folder, unimed, tmp_path / "out")) == 2
    assert "the features of CLIPVisionModel with its weights differ by" in capsys.readouterr().err


def test_the_language_model_stays_and_the_projector_depends_on_the_seed(
    exchanged: Path, unimed: Path, student_folder: Path, tmp_path: Path
) -> None:
    old, new = (load_file(folder / "model.safetensors") for folder in (student_folder, exchanged))
    language = [name for name in old if "vision" not in name and "projector" not in name]
    assert len(language) == 3 * 9 + 3  # per block; the embedding, the last norm and the output layer
    assert all(torch.equal(old[name], new[name]) for name in language)
    exchange(student_folder, str(unimed), tmp_path / "again")
    exchange(student_folder, str(unimed), tmp_path / "other", seed=1)
    again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "other"))
    assert all(torch.equal(again[name], value) for name, value in new.items())
    assert {name for name, value in new.items() if not torch.equal(other[name], value)} == {
        name for name in new if "projector" in name
    }


def test_a_step_reaches_every_weight_of_the_projector(exchanged: Path) -> None:
    student = load(exchanged)
    student(tiny.batch(tokens=36, size=SIZE), tap=False).logits.square().sum().backward()
    groups = student.trainable()
    assert groups.keys() == {"adapters", "projector"}
    assert len(groups["projector"]) == 4
    assert all(bool(p.grad.abs().sum() > 0) for _, p in groups["projector"])


@pytest.mark.parametrize("save", [authors.save_huatuo, authors.save_llava_llama])
def test_a_student_in_its_authors_layout(save: Callable[[Path], Path], unimed: Path, tmp_path: Path) -> None:
    save(tmp_path / "student")
    assert main(words(tmp_path / "student", unimed, tmp_path / "out")) == 0
    require_same_features(tmp_path / "out", unimed)
    before, after = (check_student(StudentConfig(path=str(tmp_path / name), layer=1))[1] for name in ("student", "out"))
    assert after.tokenizer("a lung").input_ids == before.tokenizer("a lung").input_ids
    assert (after.chat_template, after.image_token) == (before.chat_template, before.image_token)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "out"))
    assert torch.equal(old["lm_head.weight"], new["language_model.lm_head.weight"])


def test_the_new_parts_have_the_precision_of_the_student(unimed: Path, student_folder: Path, tmp_path: Path) -> None:
    LlavaForConditionalGeneration.from_pretrained(student_folder, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half"
    )
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(student_folder / name, tmp_path / "half")
    assert main(words(tmp_path / "half", unimed, tmp_path / "out")) == 0
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert '"float32"' not in (tmp_path / "out" / "config.json").read_text()


def test_what_cannot_be_exchanged_is_named(unimed: Path, student_folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    stem = {"image_size": 48, "patch_size": 8, "width": 24, "head_width": 8, "layers": 3}
    write_open_clip(tmp_path / "scaled", stem | {"ls_init_value": 0.1})
    named = f"open_clip:ViT-B-32/{unimed / 'open_clip_model.safetensors'}"
    for student, teacher, output, message in (
        (student_folder, unimed, tmp_path, "already exists; choose a new folder"),
        (tmp_path / "none", unimed, tmp_path / "out", "is not a model folder (no config.json)"),
        (tmp_path / "gemma", unimed, tmp_path / "out", "a gemma3 is not supported; give a LLaVA"),
        (student_folder, tmp_path / "none", tmp_path / "out", "does not exist; models are read only"),
        (student_folder, named, tmp_path / "out", "set teacher.mean and teacher.std"),
        (
            student_folder,
            tmp_path / "scaled",
            tmp_path / "out",
            "fit CLIPVisionModel: 6 unexpected: encoder.layers.0.ls",
        ),
    ):
        assert main(words(student, teacher, output)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["unimed_l14", "unimed_b16", "biomedclip"])
def test_the_published_towers_fit(name: str, monkeypatch: Any) -> None:
    """On shapes, at the real size; the ViT-L/14 is the tower that LLaVA-Med has, with other weights."""
    monkeypatch.setattr(teacher_towers, "_require_same_features", lambda *_: None)
    source = find_teacher(CONFIGS / name)
    with torch.device("meta"):
        model = teacher_towers.transformers_tower(source, tower_class(source).build(source, "before_norm"))
    config = model.config.to_dict()
    if name == "unimed_l14":
        known = json.loads((CONFIGS / "llava_med" / "config.json").read_text())["vision_config"]
    else:
        known = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
        known |= {"patch_size": 16}
    assert {key: config[key] for key in known} == known
