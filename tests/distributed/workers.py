"""The workers of the distributed tests. Each function takes settings and returns values for JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from medalign import distributed
from medalign.assembly import build_teachers, parameter_groups
from medalign.config import Config, FurtherTeacher, LoraConfig
from medalign.contracts import Batch
from medalign.engine import engine as door
from medalign.engine.engine import Engine
from medalign.engine.settings import deepspeed_settings, precision
from medalign.losses import build_objective
from medalign.student.loading import load_student
from medalign.student.model import Student
from medalign.teacher.targets import assert_replicated
from medalign.training.schedule import peaks
from medalign.training.step import TrainStep
from tests import tiny


def configure(settings: dict[str, Any]) -> Config:
    config = Config()
    config.student.path, config.teacher.path = settings["student"], settings["teacher"]
    config.student.layer, config.student.lora = 2, LoraConfig(rank=4, alpha=8)
    config.student.train_projector = True
    config.losses.alpha, config.losses.beta = settings.get("alpha", 1.0), settings.get("beta", 0.5)
    if settings.get("two_teachers"):  # two copies of one teacher, each with half of the losses
        config.teacher.similarity_weight = config.teacher.attention_weight = 0.5
        config.teacher.also = [FurtherTeacher(config.teacher.path, similarity_weight=0.5, attention_weight=0.5)]
    config.losses.extra = settings.get("extra", [])
    config.losses.language_mean = settings.get("language_mean", "tokens")
    config.train.steps, config.train.lr = 100, 1e-3
    config.train.projector_lr = settings.get("projector_lr", 1e-3)
    config.train.weight_decay = settings.get("weight_decay", 0.0)
    config.train.batch_size, config.train.micro_batch_size = settings.get("batch", 4), settings["micro"]
    config.train.precision = settings.get("precision", "fp32")
    config.engine.deepspeed = settings.get("engine", "cpu")
    return config


def rows(settings: dict[str, Any], step: int) -> list[Batch]:
    """Return the global batch of a step as batches of one sample, of different lengths and without padding."""
    lengths = [(5, 4), (9, 2), (3, 7), (6, 1), (2, 2), (8, 3), (4, 4), (7, 5)][: settings.get("batch", 4)]
    return [
        tiny.batch(
            texts=(lengths[i],),
            images=i not in settings.get("text_only", []),
            seed=i if settings.get("same") else 100 * step + i,
            size=32,
        )
        for i in range(len(lengths))
    ]


def join(parts: list[Batch]) -> Batch:
    """Join several batches of one sample to one batch, padded on the right."""
    longest = max(part.input_ids.shape[1] for part in parts)
    fills = {"input_ids": 0, "attention_mask": False, "labels": -100, "question_mask": False, "image_index": -1}

    def pad(name: str, part: Batch) -> torch.Tensor:
        value = getattr(part, name)
        return torch.nn.functional.pad(value, (0, longest - value.shape[1]), value=fills[name])

    padded: dict[str, Any] = {name: torch.cat([pad(name, part) for part in parts]) for name in fills}
    real = [(row, part) for row, part in enumerate(parts) if part.image_weight.sum() > 0]
    for number, (row, _) in enumerate(real):
        index = padded["image_index"][row]
        padded["image_index"][row] = torch.where(index >= 0, number, index)
    for name in ("student_pixels", "teacher_pixels", "image_weight", "patch_valid"):
        padded[name] = torch.cat([getattr(part, name) for _, part in real or [(0, parts[0])]])
    padded["image_sample"] = torch.tensor([row for row, _ in real] or [0])
    return Batch(**padded, keys=tuple(key for part in parts for key in part.keys))


def share(settings: dict[str, Any], step: int) -> list[Batch]:
    """Return this rank's micro-batches of a step."""
    whole = rows(settings, step)
    mine = len(whole) // distributed.world_size()
    local = whole[distributed.rank() * mine :][:mine]
    micro = settings["micro"]
    # The teacher of the tests takes 48 pixels, the student 32.
    batches = [join(local[i : i + micro]) for i in range(0, mine, micro)]
    if settings.get("packed"):
        batches = [tiny.packed(batch) for batch in batches]
    return [_with_teacher_pixels(batch, 2 if settings.get("two_teachers") else 1) for batch in batches]


def _with_teacher_pixels(batch: Batch, teachers: int) -> Batch:
    pixels = torch.nn.functional.interpolate(batch.teacher_pixels, size=48)
    return dataclasses.replace(batch, teacher_pixels=pixels, teacher_inputs=({"pixels": pixels},) * teachers)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return one hash of the bits of many tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())  # NumPy has no bf16
    return total.hexdigest()


def scenarios(settings: dict[str, Any]) -> dict[str, Any]:
    """Run every scenario in turn, in one process group, because starting ranks takes longer than their work."""
    door.start({})
    results = {name: train(settings["common"] | own) for name, own in settings["scenarios"].items()}
    door.stop()
    return results


def build(config: Config, *, steered: bool = False, warm: bool = False) -> tuple[Engine, Student, TrainStep]:
    """Build engine, student and step as a run does.

    `steered` starts from a W that is not zero. `warm` also starts from random adapters, which is possible where ZeRO
    does not partition them during loading.
    """
    ds_settings = deepspeed_settings(config, distributed.world_size())
    teachers = build_teachers(config)
    with door.sharded_loading(ds_settings):
        student = load_student(config.student, precision(config))
    if steered:
        torch.nn.init.normal_(student.steering.weight, std=0.1)
    if warm:
        _warm(student)
    student.train()
    engine = Engine(student, parameter_groups(student, config), ds_settings)
    for teacher in teachers:
        assert_replicated(teacher)
    first, also = (teachers[0] if teachers else None), teachers[1:]
    return engine, student, TrainStep(engine, first, build_objective(config), student.spec.grid, also)


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train some steps under ZeRO; return the losses, hashes of the frozen weights, and what changed."""
    config = configure(settings)
    engine, student, step = build(config, steered=settings.get("steered", False))
    sharded = sum(p.ds_numel > p.ds_tensor.numel() for p in student.parameters() if hasattr(p, "ds_tensor"))
    before = _everything(engine, student)
    losses = [step(share(settings, number), peaks(config.train)) for number in range(settings["steps"])]
    after = _everything(engine, student)
    learning = {name for named in student.trainable().values() for name, _ in named}
    frozen = {
        moment: digest({name: value for name, value in state.items() if name not in learning})
        for moment, state in (("before", before), ("after", after))
    }
    return {
        "losses": losses,
        "frozen": frozen,
        "changed": sorted(name for name in before if not torch.equal(before[name], after[name])),
        "learnt": {name: value.double().norm().item() for name, value in after.items() if name in learning},
        "sharded": sharded,
    }


def language_gradients(settings: dict[str, Any]) -> dict[str, Any]:
    """Compare loss and gradient of one step of each scenario under ZeRO with those of `_plain_gradients`."""
    door.start({})
    results = {name: _language_gradients(settings["common"] | own) for name, own in settings["scenarios"].items()}
    door.stop()
    return results


def _language_gradients(settings: dict[str, Any]) -> dict[str, float]:
    config = configure(settings)
    expected_loss, expected = _plain_gradients(config, rows(settings, 0))
    engine, student, step = build(config, warm=True)
    found: dict[str, torch.Tensor] = {}
    update = engine.step

    def read_then_update(rates: dict[str, float]) -> float:
        for name, parameter in student.named_parameters():
            if parameter.requires_grad and engine._engine.is_gradient_accumulation_boundary():
                found[name] = safe_get_full_grad(parameter)
        return update(rates)

    engine.step = read_then_update
    losses = step(share(settings, 0), peaks(config.train))
    whole, difference = (
        torch.stack([tensor.double().norm() for tensor in tensors]).norm()
        for tensors in (expected.values(), [found[name].view_as(value) - value for name, value in expected.items()])
    )
    return {"loss": losses["loss/language"], "plain": expected_loss, "error": float(difference / whole)}


def _plain_gradients(config: Config, samples: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean over samples of their mean losses, with one pass per sample and without an engine."""
    student = load_student(config.student, precision(config))
    _warm(student)
    total = 0.0
    for sample in samples:
        output = student.train()(dataclasses.replace(sample, labels=sample.input_ids), tap=False)
        loss = torch.nn.functional.cross_entropy(output.logits[0], sample.labels[0, 1:]) / len(samples)
        loss.backward()
        total += float(loss.detach())
    named = [pair for group in student.trainable().values() for pair in group]
    return total, {name: p.grad for name, p in named if p.grad is not None}


def _warm(student: Student) -> None:
    """Initialize adapters and W randomly, but not the projector, which ZeRO-3 may have partitioned already."""
    torch.manual_seed(1)
    for group in ("adapters", "steering"):
        for _, parameter in student.trainable()[group]:
            torch.nn.init.normal_(parameter, std=0.05)


def _everything(engine: Engine, student: Student) -> dict[str, torch.Tensor]:
    return engine.gather_parameters(list(student.named_parameters()))


def main(functions: dict[str, Any]) -> None:
    """Run the function on the command line with the settings in the folder on the command line."""
    folder = Path(sys.argv[2])
    result = functions[sys.argv[1]](json.loads((folder / "settings.json").read_text()))
    (folder / f"result-{distributed.rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(globals())
