"""The parts of a run, built from its settings: teachers, student, engine, collator, callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from medalign import distributed, pipeline
from medalign.config import Config
from medalign.contracts import Batch, Sample
from medalign.data.batches.collator import Collator
from medalign.data.shards.index import ShardIndex
from medalign.engine import engine as deepspeed_engine
from medalign.engine.engine import Engine
from medalign.engine.settings import precision
from medalign.run_folder import RunFolder
from medalign.student import loading
from medalign.student.model import Student, check_causality
from medalign.teacher.cache.teacher import CachedTeacher
from medalign.teacher.loading import load_tower, require_attention
from medalign.teacher.model import TargetSource
from medalign.teacher.targets import assert_replicated
from medalign.training import schedule
from medalign.training.callbacks import Callback, Profiler, Validation


def build_models(
    config: Config, ds_settings: dict[str, Any], max_images: int
) -> tuple[Engine, list[TargetSource], Student, Collator]:
    """Build what a run trains and reads with. Every rank must call it.

    Args:
        config: the whole configuration.
        ds_settings: the complete DeepSpeed configuration.
        max_images: maximum number of images per sample.

    Returns:
        The engine, the teachers, the student inside the engine, and the collator of training samples.

    Raises:
        ConfigError: a model cannot be used with these settings.
    """
    # The teachers come first: what is built once ZeRO-3 partitions modules would be partitioned too.
    teachers = build_teachers(config)
    with deepspeed_engine.sharded_loading(ds_settings):
        student = loading.load_student(config.student, precision(config), config.run.seed)
    for capture in student.attention_captures:
        capture.impl = config.losses.impl
    student.train()
    engine = Engine(student, parameter_groups(student, config), ds_settings)
    for teacher in teachers:
        assert_replicated(teacher)
    processor = loading.load_processor(config.student)
    views = [teacher.view for teacher in teachers]
    first, also = (views[0] if views else None), views[1:]
    collator = pipeline.build_collator(config, student.spec, processor, first, max_images, also)
    check_causality(student, sanity_batch(collator.without_teachers()).to(engine.device))
    return engine, teachers, student, collator


def build_teachers(config: Config) -> list[TargetSource]:
    """The teachers of this rank, frozen, in the order of the settings; none when nothing is distilled.

    Those with a cache are read from it, and their weights are not loaded.
    """
    if config.train.steps == 0:
        return []
    require_attention(config)
    device, dtype = distributed.device(), precision(config)
    return [
        CachedTeacher(settings).to(device) if settings.cache else load_tower(settings, device, dtype)
        for settings in config.teachers
    ]


def parameter_groups(student: Student, config: Config) -> list[dict[str, Any]]:
    """The parameters by kind, with their learning rate, weight decay and settings of AdamW.

    A kind that decays is two groups of the same name: matrices, and vectors, which do not decay.
    """
    peaks, decays = schedule.peaks(config.train), schedule.decays(config.train)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": peaks[name],
            "weight_decay": decay,
            "betas": config.optimizer.betas,
            "eps": config.optimizer.eps,
        }
        for name, named in student.trainable().items()
        for decay, parameters in _by_decay([p for _, p in named], decays[name]).items()
    ]


def _by_decay(parameters: Sequence[Any], decay: float) -> dict[float, list[Any]]:
    """Divide parameters by their weight decay, which biases, the weights of norms and DoRA's norms do not have."""
    groups: dict[float, list[Any]] = {}
    for parameter in parameters:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the shape of what it has partitioned
        groups.setdefault(decay if len(shape) > 1 else 0.0, []).append(parameter)
    return groups


def build_callbacks(config: Config, folder: Path, held_out: ShardIndex | None, collator: Collator) -> list[Callback]:
    """The callbacks of every rank that the settings ask for, apart from checkpoints."""
    callbacks: list[Callback] = []
    if config.log.profile_steps:
        callbacks.append(Profiler(config.log.profile_steps, RunFolder(folder).profile))
    if held_out is not None:
        batches = pipeline.build_validation_loader(config, held_out, collator)
        callbacks.append(Validation(config.train.evaluate_every, batches, config.train.best_metric))
    return callbacks


def sanity_batch(collator: Collator) -> Batch:
    """Two questions of different lengths about a gray image, to check the model before the first step."""
    gray = Image.new("RGB", (8, 8), (128, 128, 128))
    questions = ("Is this study normal?", "Where is the abnormality?")
    return collator([Sample("probe", "none", "vqa", question, "yes", "closed", (gray,)) for question in questions])
