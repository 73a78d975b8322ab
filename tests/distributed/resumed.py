"""The worker of test_resumed.py: students that train, are saved, loaded into a new engine, and train again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medalign import distributed, run
from medalign.config import Config, LoraConfig, StudentConfig
from medalign.contracts import Batch
from medalign.engine import engine as door
from medalign.engine.settings import deepspeed_settings
from medalign.losses import build_objective
from medalign.training.schedule import peaks
from medalign.training.step import TrainStep
from tests.distributed.workers import main
from tests.unit.student.families.cases import CASES

STEPS = 2  # before the save, and again after it


def resumed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return, for each student, the losses after a save, without and with a new engine in between."""
    door.start({})
    results = {}
    for name, own in settings["students"].items():
        changes = own["student"] | ({"lora": LoraConfig(**own["student"]["lora"])} if "lora" in own["student"] else {})
        student = CASES[own["family"]].config(Path(own["folder"]), **changes)
        config = _config(student, settings["teacher"], own.get("engine", "cpu"))
        results[name] = _resumed(config, Path(settings["folder"]) / name)
    door.stop()
    return results


def _config(student: StudentConfig, teacher: str, engine: str) -> Config:
    config = Config(student=student)
    config.teacher.path, config.losses.beta, config.engine.deepspeed = teacher, 0.5, engine
    config.train.steps, config.train.lr, config.train.weight_decay = 100, 1e-3, 0.1
    config.train.batch_size, config.train.micro_batch_size = 2 * distributed.world_size(), 2
    return config


def _resumed(config: Config, folder: Path) -> dict[str, Any]:
    step, batch = _build(config)
    learned = {name: len(group) for name, group in step.engine.student.trainable().items()}
    first = _train(step, batch, config)
    step.engine.save(folder)
    straight = _train(step, batch, config)
    step, batch = _build(config)
    step.engine.load(folder)
    return {"first": first, "straight": straight, "resumed": _train(step, batch, config), "learned": learned}


def _build(config: Config) -> tuple[TrainStep, Batch]:
    engine, teacher, student, collator = run._build(config, deepspeed_settings(config, distributed.world_size()), 1)
    batch = run.sanity_batch(collator)
    return TrainStep(engine, teacher, build_objective(config), student.spec.grid), batch


def _train(step: TrainStep, batch: Batch, config: Config) -> list[dict[str, float]]:
    return [step([batch], peaks(config.train)) for _ in range(STEPS)]


if __name__ == "__main__":
    main(globals())
