"""The example of a W&B sweep starts runs whose settings exist."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from medalign import config
from medalign.config.keys import flatten
from medalign.observability.metrics import find_metric

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "tools" / "sweeps").glob("*.yaml"))


def commands(sweep: dict) -> list[tuple[dict, list[str]]]:
    """The values and the command of each run of a grid, expanded as W&B's agent does."""
    names = list(sweep["parameters"])
    found = []
    for values in itertools.product(*(sweep["parameters"][name]["values"] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
        words = create_sweep_command(sweep["command"])
        place = words.index("${args}")
        found.append((chosen, [*words[:place], *macros["args"], *words[place + 1 :]]))
    return found


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_each_run_of_a_sweep_has_settings_that_exist(path, tmp_path):
    """A stand-in for the launcher writes down how it is called."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    launcher.chmod(0o755)
    sweep = yaml.safe_load(path.read_text())
    assert find_metric(sweep["metric"]["name"]) is not None
    runs = commands(sweep)
    for chosen, command in (runs[0], runs[-1]):
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc123"}
        called = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")
        assert called[:3] == ["--module", "medalign", "train"]
        recipe, *overrides = called[3:-1]
        settings = config.load(recipe, overrides)
        found = flatten(vars(settings) | {name: vars(getattr(settings, name)) for name in vars(settings)})
        assert {name: found[name] for name in chosen} == chosen
        assert settings.run.dir == "runs/sweep-abc123"
        assert settings.train.evaluate_every and settings.log.wandb == "online"
