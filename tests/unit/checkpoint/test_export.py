"""What is exported is what was trained: to the bit on disk, and in what the student says once it is read again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from medalign.checkpoint import export
from medalign.config import LoraConfig, StudentConfig
from medalign.errors import CheckpointError, ConfigError
from medalign.inference import open_student
from medalign.student.loading import load_student
from medalign.student.model import Student
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(student_folder) -> StudentConfig:
    lora = LoraConfig(rank=4, alpha=12)
    return StudentConfig(path=str(student_folder), layer=2, lora=lora, train_projector=True, epsilon=0.5)


@pytest.fixture(scope="module")
def student(settings) -> Student:
    """A student all of whose learning parts do something."""
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
    export.write(student, whole, settings, 160, folder)
    return folder


def logits(student: Student) -> torch.Tensor:
    with torch.no_grad():
        return student(tiny.batch()).logits


def test_the_files_hold_the_trained_values(student, exported):
    """peft's names are those of the student without "model." and the adapter's own name."""
    found = load_file(exported / "adapter_model.safetensors") | load_file(exported / "medalign.safetensors")
    trained = {
        name.removeprefix("model.").replace(".default.", ".") if group == "adapters" else name: value
        for group, named in student.trainable().items()
        for name, value in named
    }
    assert set(found) == set(trained) and found["steering.weight"].abs().max() > 0
    for name, value in trained.items():
        assert torch.equal(found[name], value), name


def test_read_again_it_says_the_same(student, exported):
    """To the bit: logits of a batch, and the answer's tokens."""
    again = export.read(exported, torch.float32, CPU)
    assert torch.equal(logits(again), logits(student))
    asked = tiny.batch(side="left", texts=((5, 0), (9, 0)))
    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    answer, attention = student.generate(asked, **words)
    answer_again, attention_again = again.generate(asked, **words)
    assert torch.equal(answer_again, answer) and torch.equal(attention_again, attention)


def test_every_part_of_the_export_matters(settings, student, exported):
    """Without any one of them the logits differ: the test above would see its loss."""
    for group in ("adapters", "steering", "projector"):
        broken = export.read(exported, torch.float32, CPU)
        fresh = load_student(settings, torch.float32).trainable()
        with torch.no_grad():
            for (_, parameter), (_, start) in zip(broken.trainable()[group], fresh[group], strict=True):
                parameter.copy_(start)
        assert not torch.allclose(logits(broken), logits(student), atol=1e-4), group


def test_plain_peft_reads_the_adapter(settings, student, exported):
    """W off and the projector put into the base model by hand: what is left is the adapter, which peft reads itself."""
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
    unsteered = export.read(exported, torch.float32, CPU)
    torch.nn.init.zeros_(unsteered.steering.weight)
    with torch.no_grad():
        ours = unsteered(replace(batch, labels=batch.input_ids))  # logits everywhere
    kept = batch.attention_mask[:, ours.kept]
    # float32 products in another order
    torch.testing.assert_close(ours.logits[kept], theirs[:, ours.kept][kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "cannot be read"),
        (json.dumps({"format": 1, "student": {"lora": {}, "of_the_future": 1}}), "of_the_future"),
        ('{"format": 2}', "has format 2, this version of medalign reads 1"),
    ],
)
def test_settings_that_cannot_be_read_are_named(tmp_path, text, message):
    (tmp_path / "medalign.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"medalign\.json.*{message}"):
        export.settings(tmp_path)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_answered_in_its_own_precision(settings, tmp_path, monkeypatch, dtype, gpu):
    student = load_student(settings, dtype)
    whole = {name: p.detach() for named in student.trainable().values() for name, p in named}
    export.write(student, whole, settings, 160, tmp_path)
    assert open_student(tmp_path)[0].dtype == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert export.precision(tmp_path) == dtype


def test_an_export_that_does_not_say_its_precision(exported, tmp_path, monkeypatch):
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
def test_answers_end_as_the_model_and_as_the_template_end_them(settings, student, exported, tmp_path, own, ends):
    """The template of the tiny student writes no end, so its tokenizer's (2) is what training teaches."""
    base = shutil.copytree(settings.path, tmp_path / "base")
    values = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(values | {"eos_token_id": own}))
    assert open_student(exported, str(base))[0].end_tokens == ends


def test_a_base_without_some_of_its_weights_is_refused(settings, exported, tmp_path):
    base = shutil.copytree(settings.path, tmp_path / "base")
    state = {name: value for name, value in load_file(base / "model.safetensors").items() if "lm_head" not in name}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"base: 1 of its weights are not in its safetensors files .*: lm_head.weight"
    ):
        export.read(exported, torch.float32, CPU, str(base))
