"""Checks that involve several settings. The range of a single setting is part of its field's type."""

from __future__ import annotations

import os
import re

from medalign.config.keys import ALTERNATIVES
from medalign.config.schema import Config
from medalign.errors import ConfigError


def validate(config: Config, *, models: bool = True, data: bool = True) -> None:
    """Check that no required setting is missing and that none contradicts another.

    Args:
        config: the settings.
        models: whether the paths of the models are required.
        data: whether the folders of shards are required.

    Raises:
        ConfigError: the message gives the settings and the remedy.
    """
    for first, second in ALTERNATIVES:
        _require_one(config, first, second)
    _check_models(config, models)
    _check_student(config)
    _check_further_teachers(config)
    _check_data(config, data)
    _check_mixture(config)
    keep, interval = config.checkpoint.keep_interval, config.checkpoint.interval
    _require(
        keep % interval == 0,
        f"checkpoint.keep_interval is {keep}, but only each multiple of checkpoint.interval {interval} has a "
        "checkpoint; make it a multiple of that",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _require_one(config: Config, first: str, second: str) -> None:
    """Check that exactly one of two settings is set."""
    values = [getattr(getattr(config, section), name) for section, name in (first.split("."), second.split("."))]
    found = sum(value is not None for value in values)
    _require(found < 2, f"{first} is {values[0]} and {second} is {values[1]}; set one of them")
    _require(found > 0, f"neither {first} nor {second} is set; set one of them")


def _check_models(config: Config, required: bool) -> None:
    _require(
        not required or bool(config.student.path),
        "student.path is not set; give a local model folder with --student.path DIR",
    )
    _require(
        not required or not config.distils or bool(config.teacher.path),
        "teacher.path is not set; set it, or set losses.alpha 0 and losses.beta 0",
    )


def _check_student(config: Config) -> None:
    student, weights = config.student, config.losses.layer_weights
    _require(
        bool(student.layers) and len(set(student.layers)) == len(student.layers),
        f"student.layer is {student.layer}; it must be one block, or a list of different ones",
    )
    _require(
        not weights or len(weights) == len(student.layers),
        f"losses.layer_weights has {len(weights)} numbers for {len(student.layers)} tapped blocks (student.layer); "
        "give one per block",
    )
    _require(
        student.train == "lora" or student.quantization == "none",
        f"student.train is full, but student.quantization is {student.quantization}, and weights of 4 bits cannot be "
        "trained; set student.train to lora, or student.quantization to none",
    )
    _require(
        student.train == "lora" or not student.lora.dora,
        "student.lora.dora is true, but student.train is full, which trains no adapters; set student.train to lora, or "
        "student.lora.dora to false",
    )
    _require(
        student.steering or student.steering_rank is None,
        f"student.steering_rank is {student.steering_rank}, but student.steering is false: there is no W; set "
        "student.steering to true, or student.steering_rank to null",
    )
    _require(
        student.epsilon != 0 or not student.steering,
        "student.epsilon is 0, but student.steering is true: W would change no token and get no gradient; set "
        "student.steering to false, or student.epsilon to another number, such as 1",
    )


def _check_further_teachers(config: Config) -> None:
    also = config.teacher.also
    _require(
        not also or config.distils,
        f"teacher.also has {len(also)} teachers, but losses.alpha and losses.beta are 0; remove teacher.also, or "
        "set one of them",
    )
    for number, teacher in enumerate(also, start=2):
        _require(bool(teacher.path), f"teacher.also: teacher {number} has no path; give {{path: DIR}}")
        _require(
            not teacher.name or re.fullmatch(r"[\w-]+", teacher.name) is not None,
            f"teacher.also: the name {teacher.name!r} must consist of letters, digits, - and _",
        )
    names = [teacher.name or str(number) for number, teacher in enumerate(also, start=2)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    _require(not repeated, f"teacher.also: several teachers are named {', '.join(repeated)}; give each its own name")


def _check_data(config: Config, required: bool) -> None:
    data = config.data
    _require(
        not required or config.train.steps == 0 or bool(data.folders),
        "data.train is not set; give folders of shards with --data.train DIR",
    )
    _require(
        not required or not config.train.evaluate_every or bool(data.validation_folders),
        f"train.evaluate_every is {config.train.evaluate_every}, but there are no held-out shards; give their folders "
        "with --data.validation DIR",
    )
    shards = {os.path.realpath(folder) for folder in (*data.folders, *data.validation_folders)}
    _require(
        os.path.realpath(config.run.dir) not in shards,
        f"run.dir {config.run.dir} is a folder of shards; give another folder for the run with --run.dir DIR",
    )
    _require(
        not data.cache_gib or bool(data.cache_dir),
        f"data.cache_gib is {data.cache_gib}, but data.cache_dir is not set; give a folder with --data.cache_dir DIR",
    )


def _check_mixture(config: Config) -> None:
    data, epochs = config.data, config.train.epochs
    _require(
        not data.weights or len(data.weights) == len(data.folders),
        f"data.weights has {len(data.weights)} numbers for {len(data.folders)} folders; give one per folder",
    )
    _require(
        epochs is None or not data.weights,
        f"train.epochs is {epochs} and data.weights is {data.weights}: folders mixed by weight have no common epoch; "
        "set train.steps",
    )
