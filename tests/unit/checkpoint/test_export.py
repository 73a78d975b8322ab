"""An export equals the trained student bit for bit, in its files and in the answers after it is loaded again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from medalign.checkpoint import export
from medalign.checkpoint.integrity import seal
from medalign.config import LoraConfig, StudentConfig
from medalign.errors import CheckpointError, ConfigError
from medalign.inference import open_student
from medalign.student.loading import load_student
from medalign.student.model import Student
from tests import tiny
from tests.docs.pages import blocks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(student_folder) -> StudentConfig:
    lora = LoraConfig(rank=4, alpha=12)
    return StudentConfig(path=str(student_folder), layer=2, lora=lora, train_projector=True, epsilon=0.5)


@pytest.fixture(scope="module")
def student(settings) -> Student:
    """A student in which every trainable part changes the output."""
    student = load_student(settings, torch.float32).eval()
    torch.manual_seed(1)
    for named in student.trainable().values():
        for _, parameter in named:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return student


@pytest.fixture(scope="module")
def exported(settings, student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    whole = {name: p.detach() for named in student.trainable().values() for name, p in named}
    export.write_export(student, whole, settings, 160, folder)
    return folder


def logits(student: Student) -> torch.Tensor:
    with torch.no_grad():
        return student(tiny.batch()).logits


def test_the_files_hold_the_trained_values(student, exported):
    """The names in peft's file are those of the student without "model." and the name of the adapter."""
    found = load_file(exported / "adapter_model.safetensors") | load_file(exported / "medalign.safetensors")
    trained = {
        name.removeprefix("model.").replace(".default.", ".") if group == "adapters" else name: value
        for group, named in student.trainable().items()
        for name, value in named
    }
    assert set(found) == set(trained) and found["steering.weight"].abs().max() > 0
    for name, value in trained.items():
        assert torch.equal(found[name], value), name


def test_a_loaded_export_gives_the_same_answers(student, exported):
    """Bit for bit: logits of a batch, and the tokens of the answer."""
    again = export.load_export(exported, torch.float32, CPU)
    assert torch.equal(logits(again), logits(student))
    asked = tiny.batch(side="left", texts=((5, 0), (9, 0)))
    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    answer, attention = student.generate(asked, **words)
    answer_again, attention_again = again.generate(asked, **words)
    assert torch.equal(answer_again, answer) and torch.equal(attention_again, attention)


def test_every_part_of_the_export_matters(settings, student, exported):
    """Without any one part the logits differ, so the test above would detect a missing part."""
    for group in ("adapters", "steering", "projector"):
        broken = export.load_export(exported, torch.float32, CPU)
        fresh = load_student(settings, torch.float32).trainable()
        with torch.no_grad():
            for (_, parameter), (_, start) in zip(broken.trainable()[group], fresh[group], strict=True):
                parameter.copy_(start)
        assert not torch.allclose(logits(broken), logits(student), atol=1e-4), group


def test_plain_peft_reads_the_adapter(settings, student, exported):
    """W is disabled and the projector is copied into the base model: only the adapter remains, which peft loads."""
    base = AutoModelForImageTextToText.from_pretrained(settings.path, dtype=torch.float32)
    others = load_file(exported / "medalign.safetensors")
    projector = {name.removeprefix("model.base_model.model."): v for name, v in others.items() if "projector" in name}
    assert projector and not base.load_state_dict(projector, strict=False).unexpected_keys
    plain = PeftModel.from_pretrained(base, exported).eval()
    batch = tiny.batch()
    with torch.no_grad():
        theirs = plain(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            pixel_values=batch.student_pixels,
        ).logits
    unsteered = export.load_export(exported, torch.float32, CPU)
    torch.nn.init.zeros_(unsteered.steering.weight)
    with torch.no_grad():
        ours = unsteered(replace(batch, labels=batch.input_ids))  # logits at all positions
    kept = batch.attention_mask[:, ours.kept]
    # float32 sums in another order
    torch.testing.assert_close(ours.logits[kept], theirs[:, ours.kept][kept], rtol=1e-4, atol=1e-4)


def test_the_loader_of_the_documentation_gives_the_same_logits_and_answers(settings, student, exported):
    """With W and a trained projector, in plain transformers and peft."""
    (block,) = [block for block in blocks("python") if "def load_with_w" in block.text]
    names: dict[str, Any] = {}
    exec(block.text, names)
    model = names["load_with_w"](exported, settings.path, torch.float32)
    batch = tiny.batch(side="left", texts=((5, 0), (9, 0)))
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask.long(),
        "pixel_values": batch.student_pixels,
    }
    with torch.no_grad():
        theirs = model(**inputs).logits
        ours = student(replace(batch, labels=batch.input_ids))
    kept = batch.attention_mask[:, ours.kept]
    # float32 sums in another order
    torch.testing.assert_close(theirs[:, ours.kept][kept], ours.logits[kept], rtol=1e-4, atol=1e-4)
    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    answers = model.generate(**inputs, **words)[:, batch.input_ids.shape[1] :]
    assert torch.equal(answers, student.generate(batch, **words)[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "cannot be read"),
        (json.dumps({"format": 1, "student": {"lora": {}, "of_the_future": 1}}), "of_the_future"),
        ('{"format": 2}', "has format 2, but this version of medalign reads format 1"),
    ],
)
def test_unreadable_settings_are_an_error(tmp_path, text, message):
    (tmp_path / "medalign.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"medalign\.json.*{message}"):
        export.settings(tmp_path)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_use_the_precision_of_the_run(settings, tmp_path, monkeypatch, dtype, gpu):
    student = load_student(settings, dtype)
    whole = {name: p.detach() for named in student.trainable().values() for name, p in named}
    export.write_export(student, whole, settings, 160, tmp_path)
    assert open_student(tmp_path)[0].dtype == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert export.precision(tmp_path) == dtype


def test_an_export_without_its_precision(exported, tmp_path, monkeypatch):
    values = json.loads((exported / "medalign.json").read_text())
    assert values.pop("dtype") == "float32"
    (tmp_path / "medalign.json").write_text(json.dumps(values))
    assert export.precision(tmp_path) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert export.precision(tmp_path) == torch.bfloat16
    (tmp_path / "medalign.json").write_text(json.dumps(values | {"dtype": "float17"}))
    with pytest.raises(CheckpointError, match=r"medalign.json cannot be read \('float17'\)"):
        export.precision(tmp_path)


@pytest.mark.parametrize(("own", "ends"), [(None, [2]), (2, [2]), ([7, 9], [2, 7, 9]), (5, [2, 5])])
def test_answers_end_at_the_end_tokens_of_model_and_template(settings, student, exported, tmp_path, own, ends):
    """The template of the tiny student has no end token, so training uses that of its tokenizer (2)."""
    base = shutil.copytree(settings.path, tmp_path / "base")
    values = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(values | {"eos_token_id": own}))
    assert open_student(exported, str(base))[0].end_tokens == ends


def test_a_base_model_with_missing_weights_is_rejected(settings, exported, tmp_path):
    base = shutil.copytree(settings.path, tmp_path / "base")
    state = {name: value for name, value in load_file(base / "model.safetensors").items() if "lm_head" not in name}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"base: 1 of its weights are not in its safetensors files .*: lm_head.weight"
    ):
        export.load_export(exported, torch.float32, CPU, str(base))


def test_a_damaged_export_in_a_checkpoint_is_an_error(exported, tmp_path):
    checkpoint = tmp_path / "step-000004"
    shutil.copytree(exported, checkpoint / "export")
    seal(checkpoint, {})
    export.copy(checkpoint / "export", tmp_path / "whole")
    weights = checkpoint / "export" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)  # still valid safetensors
    message = r"step-000004: export/adapter_model\.safetensors is damaged: .* SHA-256; give another checkpoint"
    with pytest.raises(CheckpointError, match=message):
        export.load_export(checkpoint / "export", torch.float32, CPU)
    with pytest.raises(CheckpointError, match=message):
        export.copy(checkpoint / "export", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
