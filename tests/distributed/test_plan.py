"""The bytes that `medalign plan` derives, against what torch holds under ZeRO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from medalign import config as settings_of
from medalign.engine.settings import deepspeed_settings
from medalign.planning import memory
from medalign.planning.shapes import student_on_meta
from tests.distributed.ranks import ROOT, run_worker

STAGES = ("zero2", "zero3", "small_threshold")  # with the last, some parameters are sharded and some are not


@pytest.fixture(scope="module")
def recipe(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "recipe.yaml"
    settings = {
        "student": {"path": str(student_folder), "layer": 1, "lora": {"rank": 8}, "train_projector": True},
        "losses": {"alpha": 0, "beta": 0},
        "data": {"train": "unread"},
        "train": {"batch_size": 8, "micro_batch_size": 2, "precision": "bf16"},
    }
    path.write_text(yaml.safe_dump(settings))
    zero3 = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    (path.parent / "small_threshold.json").write_text(json.dumps(zero3))
    return path


def engine(recipe: Path, name: str) -> str:
    """The value of engine.deepspeed."""
    return str(recipe.parent / f"{name}.json") if name == "small_threshold" else name


@pytest.fixture(scope="module")
def measured(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    settings = {"engines": {name: engine(recipe, name) for name in STAGES}, "recipe": str(recipe)}
    return run_worker("held", settings, 2, tmp_path_factory.mktemp("held"), module="planned")


@pytest.mark.parametrize("kind", ["weights", "gradients", "optimizer"])
@pytest.mark.parametrize("name", STAGES)
def test_planned_bytes_are_those_that_torch_holds(recipe, measured, name, kind):
    config = settings_of.load(str(recipe), ["--engine.deepspeed", engine(recipe, name)])
    student = student_on_meta(config.student, torch.bfloat16)
    planned = getattr(memory.state(student, (), deepspeed_settings(config, 2), 2, 2), kind)
    largest = max(rank[name][kind] for rank in measured)
    assert largest == planned
