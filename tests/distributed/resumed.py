"""The worker of test_resumed.py: students that train, are saved, loaded into a new engine, and train again."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from medalign import assembly, distributed, pipeline
from medalign.config import Config, LoraConfig
from medalign.contracts import Batch
from medalign.engine import engine as door
from medalign.student.loading import load_processor
from medalign.training.schedule import peaks
from medalign.training.step import TrainStep
from tests.distributed.workers import build, main
from tests.unit.student.families.cases import CASES


def resumed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return, for each student, the losses after a save, without and with a new engine in between."""
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage whenever it builds an engine
    door.start({})
    results = {name: _resumed(own, settings, name) for name, own in settings["students"].items()}
    door.stop()
    return results


def _resumed(own: dict[str, Any], settings: dict[str, Any], name: str) -> dict[str, Any]:
    config = _config(own, settings["teacher"])
    _, student, step = build(config)
    learned = {group: len(named) for group, named in student.trainable().items()}
    batch = _batch(config, step, student)
    first = _train(step, batch, config, 1)
    folder = Path(settings["folder"]) / name
    for write in step.engine.capture(folder, copy=False):
        write()
    distributed.barrier()
    straight = _train(step, batch, config, 2)
    _, _, again = build(config)
    again.engine.load(folder)
    return {"first": first, "straight": straight, "resumed": _train(again, batch, config, 2), "learned": learned}


def _config(own: dict[str, Any], teacher: str) -> Config:
    changes = dict(own["student"])
    if "lora" in changes:
        changes["lora"] = LoraConfig(**changes["lora"])
    config = Config(student=CASES[own["family"]].config(Path(own["folder"]), **changes))
    config.teacher.path, config.losses.beta, config.engine.deepspeed = teacher, 0.5, own.get("engine", "cpu")
    config.train.steps, config.train.lr, config.train.weight_decay = 100, 1e-3, 0.1
    config.train.batch_size, config.train.micro_batch_size = 2 * distributed.world_size(), 2
    return config


def _batch(config: Config, step: TrainStep, student: Any) -> Batch:
    processor = load_processor(config.student)
    view = step.teachers[0].view
    return assembly.sanity_batch(pipeline.build_collator(config, student.spec, processor, view, 1))


def _train(step: TrainStep, batch: Batch, config: Config, steps: int) -> list[dict[str, float]]:
    return [step([batch], peaks(config.train)) for _ in range(steps)]


if __name__ == "__main__":
    main(globals())
