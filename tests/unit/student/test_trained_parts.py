"""Full fine-tuning and a trained vision tower: what learns, its gradients, its weight decay, its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from medalign.assembly import parameter_groups
from medalign.checkpoint import export
from medalign.config import Config, LoraConfig, StudentConfig
from medalign.student.loading import load_student
from medalign.student.model import Student
from medalign.student.trained_parts import unused_in_tower
from tests import tiny
from tests.unit.student.families.cases import CASES

FULL: dict[str, Any] = {"train": "full", "train_vision_tower": True, "train_projector": True}


def config(folder: Path, **settings: Any) -> StudentConfig:
    return StudentConfig(**{"path": str(folder), "layer": 2, "lora": LoraConfig(rank=4, alpha=8)} | settings)


def load(folder: Path, **settings: Any) -> Student:
    return load_student(config(folder, **settings), torch.float32).train()


def test_full_fine_tuning_trains_the_language_model_and_nothing_else(student_folder: Path) -> None:
    student = load(student_folder, train="full")
    groups = student.trainable()
    assert groups.keys() == {"language_model", "steering"}
    spec = student.spec
    wanted = {*spec.language_model.parameters(), *spec.model.get_output_embeddings().parameters()}
    assert {p for _, p in groups["language_model"]} == wanted
    assert not any(p.requires_grad for part in (spec.vision_tower, spec.projector) for p in part.parameters())


def test_gradients_equal_those_of_the_plain_model(student_folder: Path) -> None:
    student, batch = load(student_folder, **FULL, steering=False), tiny.batch()
    plain = AutoModelForImageTextToText.from_pretrained(student_folder, dtype=torch.float32).train()
    kept = (batch.labels[:, 1:] != -100).any(0).nonzero()[:, 0]
    logits = plain(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        pixel_values=batch.student_pixels,
    ).logits
    real = batch.attention_mask[:, kept]
    logits[:, kept][real].square().sum().backward()
    student(batch, tap=False).logits[real].square().sum().backward()
    own = dict(plain.named_parameters())
    for group in student.trainable().values():
        for name, parameter in group:
            expected = own[name.removeprefix("model.")].grad
            assert parameter.grad is not None and expected is not None, name
        # fp32 sums in another order
        close = {"rtol": 1e-3, "atol": 1e-4 * float(expected.abs().max())}
        torch.testing.assert_close(parameter.grad, expected, **close, msg=name)


def test_the_tower_learns_as_far_as_image_tokens_depend_on_it(student_folder: Path) -> None:
    """LLaVA takes the output of the block before the last one: the last block and the norm after it are unused."""
    student = load(student_folder, train_vision_tower=True)
    unused = unused_in_tower(student.spec)
    assert unused and all("layers.1." in name or "post_layernorm" in name for name in unused)
    named = dict(student.spec.vision_tower.named_parameters())
    assert {name for name, p in named.items() if not p.requires_grad} == unused
    assert len(student.trainable()["vision_tower"]) == len(named) - len(unused)


@pytest.mark.parametrize("images", [True, False])
def test_every_trained_parameter_gets_a_gradient(student_folder: Path, images: bool) -> None:
    """Without an image it is zero in the tower, but it is there: ZeRO-3 waits for it."""
    student = load(student_folder, **FULL)
    output = student(tiny.batch(images=images))
    (output.logits.square().mean() + 0 * output.tokens.sum()).backward()
    for group, named in student.trainable().items():
        gradients = [p.grad for _, p in named]
        assert all(gradient is not None for gradient in gradients), group
        moved = any(float(gradient.abs().max()) > 0 for gradient in gradients if gradient is not None)
        assert moved == (images or group == "language_model"), group


@pytest.mark.parametrize("settings", [FULL, {"lora": LoraConfig(rank=4, dora=True)}], ids=["full", "dora"])
def test_matrices_decay_and_vectors_do_not(student_folder: Path, settings: dict[str, Any]) -> None:
    student, run = load(student_folder, **settings), Config()
    run.train.weight_decay, run.train.lr, run.train.vision_tower_lr = 0.1, 1e-3, 1e-5
    groups = parameter_groups(student, run)
    for group in groups:
        decays = group["weight_decay"] > 0
        assert all((p.ndim > 1) == decays for p in group["params"] if group["name"] != "steering")
        assert group["lr"] == {"vision_tower": 1e-5, "projector": 2e-5}.get(group["name"], 1e-3)
    assert sum(len(group["params"]) for group in groups) == sum(map(len, student.trainable().values()))
    run.train.weight_decay = 0.0
    names = [group["name"] for group in parameter_groups(student, run)]
    assert len(names) == len(set(names))  # without decay, a group per kind, as before


FORMS: dict[str, dict[str, Any]] = {
    "full": {**FULL, "steering_rank": 4},
    "dora": {"lora": LoraConfig(rank=4, alpha=8, dora=True), "layer": [2, 1]},
}


@pytest.mark.parametrize("form", FORMS)
def test_an_export_holds_all_that_was_trained(student_folder: Path, tmp_path: Path, form: str) -> None:
    """Loaded again and, without W, merged into a folder of transformers."""
    settings = config(student_folder, **FORMS[form])
    student = load(student_folder, **FORMS[form]).eval()
    torch.manual_seed(1)
    for named in student.trainable().values():
        for _, parameter in named:
            parameter.data += 0.02 * torch.randn_like(parameter)
    whole = {name: p.detach() for named in student.trainable().values() for name, p in named}
    export.write_export(student, whole, settings, 160, tmp_path / "export")
    assert (tmp_path / "export" / "adapter_config.json").is_file() == (form != "full")
    again = export.load_export(tmp_path / "export", torch.float32, torch.device("cpu"))
    batch = tiny.batch()
    with torch.no_grad():
        found, expected = again(batch), student(batch)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.attention, expected.attention)
        settings.steering, student.steering = False, None
        rest = {name: value for name, value in whole.items() if not name.startswith("steering")}
        export.write_export(student, rest, settings, 160, tmp_path / "plain")
        export.merge(tmp_path / "plain", tmp_path / "merged")
        merged = load(tmp_path / "merged", steering=False).eval()
        # DoRA divides by the norm of the merged weight: fp32 sums in another order
        torch.testing.assert_close(merged(batch).logits, student(batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [True, False])
def test_the_code_of_the_authors_reads_a_trained_tower(tmp_path: Path, trained: bool) -> None:
    """It takes the tower from the repository that config.json names, unless a setting says that it was trained."""
    case = CASES["llava_qwen2"]
    settings = case.config(case.save(tmp_path / "base"), steering=False, train_vision_tower=trained)
    student = load_student(settings, torch.float32)
    for named in student.trainable().values():
        for _, parameter in named:
            parameter.data += 0.02
    whole = {name: p.detach() for named in student.trainable().values() for name, p in named}
    export.write_export(student, whole, settings, 160, tmp_path / "export")
    export.merge(tmp_path / "export", tmp_path / "merged", authors_layout=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    tower = [name for name in before if name.startswith("model.vision_tower.")]
    assert tower and any(not torch.equal(before[name], after[name]) for name in tower) == trained
    values = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert ("unfreeze_mm_vision_tower" in values) == trained
    assert values == json.loads((tmp_path / "base" / "config.json").read_text()) | (
        {"unfreeze_mm_vision_tower": True} if trained else {}
    )
