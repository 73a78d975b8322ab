"""The models on the meta device have the parameters, and save the bytes, of those that training builds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from medalign.config import Config, FurtherTeacher, StudentConfig
from medalign.errors import ConfigError
from medalign.losses.language_model import language_model
from medalign.planning import memory, shapes
from medalign.planning.work import operations
from medalign.student import loading
from medalign.teacher.loading import load_teacher
from tests import tiny

SAMPLES, LENGTH = 2, 30
FORMS = {
    "plain": {},
    "everything": {"train_projector": True, "query_mixture": True, "lora": {"rank": 4, "dropout": 0.1}},
    "no steering": {"steering": False},
    "full": {"train": "full", "train_vision_tower": True, "steering_rank": 4},
}


def student_config(folder: Path, form: str = "plain", **more) -> StudentConfig:
    config = StudentConfig(path=str(folder), layer=1)
    for name, value in (FORMS[form] | more).items():
        if name == "lora":
            for key, number in value.items():
                setattr(config.lora, key, number)
        else:
            setattr(config, name, value)
    return config


@pytest.mark.parametrize("form", FORMS)
def test_the_parameters_are_those_of_the_loaded_student(student_folder, form):
    config = student_config(student_folder, form)
    empty = shapes.student_on_meta(config, torch.bfloat16)
    real = loading.load_student(config, torch.bfloat16)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in empty.named_parameters()} == {
        name: (p.shape, p.dtype, p.requires_grad) for name, p in real.named_parameters()
    }


def test_a_folder_with_only_config_json_is_enough(student_folder, tmp_path):
    shutil.copy(student_folder / "config.json", tmp_path)
    student = shapes.student_on_meta(student_config(tmp_path), torch.float32)
    real = shapes.student_on_meta(student_config(student_folder), torch.float32)
    assert shapes.parameters(student) == shapes.parameters(real)


def test_a_folder_without_config_json_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        shapes.student_on_meta(student_config(tmp_path), torch.float32)


def test_the_teacher_has_the_parameters_of_the_loaded_one(teacher_folder, tmp_path):
    config = Config()
    config.teacher.path = str(tmp_path)
    shutil.copy(teacher_folder / "open_clip_config.json", tmp_path)  # without weights
    tower = shapes.teacher_on_meta(config)
    assert tower is not None
    assert shapes.parameters(tower) == shapes.parameters(load_teacher(teacher_folder).tower)


def test_no_teacher_where_nothing_is_distilled():
    config = Config()
    config.losses.alpha = config.losses.beta = 0.0
    assert shapes.teacher_on_meta(config) is None


def test_each_running_teacher_has_memory_and_work_and_a_cached_one_has_none(student_folder, teacher_folder):
    config = Config()
    config.student.path, config.teacher.path = str(student_folder), str(teacher_folder)
    config.student.layer = 1
    student = shapes.student_on_meta(config.student, torch.float32)
    one = shapes.teachers_on_meta(config)
    config.teacher.also = [FurtherTeacher(str(teacher_folder)), FurtherTeacher(str(teacher_folder), cache="targets")]
    three = shapes.teachers_on_meta(config)
    held = [memory.state(student, each, {}, 1, 4).teacher for each in (one, three)]
    assert held[1] == 2 * held[0] > 0
    losses = [memory.per_sample(student, each, 0, LENGTH, 7, 4).losses - 8 * LENGTH for each in (one, three)]
    assert losses[1] == 3 * losses[0] > 0
    vision = [operations(student, each, LENGTH, 7, False).vision for each in ((), one, three)]
    assert vision[2] - vision[0] == pytest.approx(2 * (vision[1] - vision[0])) and vision[1] > vision[0]


class Saved:
    """Counts what autograd saves in a real forward pass: each storage once, without parameters."""

    def __init__(self, student) -> None:
        self.blocks: list[int] = []
        self.total = 0
        self._inside = False
        self._seen = {p.untyped_storage().data_ptr(): p for p in student.parameters()}
        for block in student.spec.blocks:
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave)

    def _enter(self, *_):
        self.blocks.append(0)
        self._inside = True

    def _leave(self, *_):
        self._inside = False

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen[storage.data_ptr()] = storage
            self.total += storage.nbytes()
            self.blocks[-1:] = [self.blocks[-1] + storage.nbytes()] if self._inside else self.blocks[-1:]
        return tensor


def run(config: StudentConfig, dtype: torch.dtype = torch.float32) -> tuple[Saved, torch.Tensor]:
    """Run a batch without padding. Returns what is saved, and the loss."""
    student = loading.load_student(config, dtype)
    student.train()
    saved = Saved(student)
    batch = tiny.batch(texts=((6, 7), (6, 7)))
    assert batch.input_ids.shape == (SAMPLES, LENGTH) and bool(batch.attention_mask.all())
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        output = student(batch)
        loss = language_model(output.logits, output.kept, batch.labels).sum
    return saved, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_the_saved_bytes_of_blocks_are_those_of_a_real_pass(student_folder, form, dtype):
    """Exactly, except in the tapped block: the real one also saves the inputs of the attention map."""
    config = student_config(student_folder, form)
    real, _ = run(config, dtype)
    planned = shapes.saved_bytes(shapes.student_on_meta(config, dtype), SAMPLES, LENGTH)
    others = [block for block in range(3) if block != config.layer]
    assert [planned.blocks[block] for block in others] == [real.blocks[block] for block in others]


def test_activations_and_logits_are_close_to_all_that_a_real_pass_saves(student_folder):
    """The rest is the tapped block's: W, the attention map and the gathered image tokens, planned under "losses"."""
    config = student_config(student_folder)
    real, loss = run(config)
    student = shapes.student_on_meta(config, torch.float32)
    saved = shapes.saved_bytes(student, SAMPLES, LENGTH)
    each = memory.per_sample(student, (), saved.total(False, (1,)), LENGTH, 7, 4)
    logits = SAMPLES * 7 * 260 * 4  # in a forward pass: the log-softmax at the labels, saved once
    assert loss.requires_grad
    assert 0.99 * real.total < saved.total(False, (1,)) + logits < real.total  # measured: 0.9 % below
    assert each.logits == 7 * 260 * 20


def test_checkpointing_keeps_inputs_the_tapped_block_and_one_recomputed_block(student_folder):
    stored = shapes.saved_bytes(shapes.student_on_meta(student_config(student_folder), torch.float32), 1, LENGTH)
    config = student_config(student_folder, gradient_checkpointing=True)
    student = shapes.student_on_meta(config, torch.float32)
    saved = shapes.saved_bytes(student, 1, LENGTH)
    assert saved == stored  # the flag changes the sum only
    inputs = LENGTH * 32 * 4
    assert saved.total(True, (1,)) == 2 * inputs + saved.blocks[1] + max(saved.blocks) + saved.rest
    assert all(block.gradient_checkpointing for i, block in enumerate(student.spec.blocks) if i != 1)


def test_saved_bytes_grow_linearly_with_the_samples_and_the_tokens(student_folder):
    student = shapes.student_on_meta(student_config(student_folder), torch.bfloat16)
    one = shapes.saved_bytes(student, 1, LENGTH)
    assert shapes.saved_bytes(student, 4, LENGTH).blocks[0] == 4 * one.blocks[0]
    assert shapes.saved_bytes(student, 1, 4 * LENGTH).blocks[0] == 4 * one.blocks[0]
