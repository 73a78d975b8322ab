from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from medalign.config import Config, FurtherTeacher
from medalign.observability.privacy import public_config
from medalign.training.loggers import wandb_session

NOT_PATHS = {  # all other settings that take any text are paths
    "student.lora.targets",
    "losses.extra",
    "train.best_metric",
    "engine.deepspeed",  # a name or a file: see below
    *(f"log.{name}" for name in ("project", "entity", "name", "group", "job_type", "tags", "notes")),
    "teacher.also.name",
}
FOLDER = "doe"


def test_secrets_and_paths_are_removed(tmp_path, monkeypatch):
    (tmp_path / "shards" / "doe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = {
        "hub": {"hub_token": "x", "apiKey": "x", "max_tokens": 5, "tokenizer": "llama", "model": "organisation/model"},
        "data": {"train": ["patients_doe"], "workers": 2},
        "run": {"dir": "runs", "seed": 3, "resume_from": Path("a")},
        "prompt": "left and/or right",
        "note": ["/home/doe", "shards/doe", "~/x", "a/b/c", "C:\\patients\\doe"],
        "none": None,
    }
    assert public_config(config) == {
        "hub": {"max_tokens": 5, "tokenizer": "llama", "model": "organisation/model"},
        "data": {"train": ["<path>"], "workers": 2},
        "run": {"dir": "<path>", "seed": 3, "resume_from": "<path>"},
        "prompt": "left and/or right",
        "note": ["<path>"] * 5,
        "none": None,
    }


def test_the_name_of_a_users_engine_file_is_removed():
    """A packaged name is kept; the name of a file, which may contain anything, is not."""
    assert public_config({"engine": {"deepspeed": "zero3"}}) == {"engine": {"deepspeed": "zero3"}}
    assert public_config({"engine": {"deepspeed": "doe_cluster.json"}}) == {"engine": {"deepspeed": "<path>"}}


def _fill_paths(section: object, prefix: str = "") -> set[str]:
    """Set each setting that is a path, at any depth, to a bare folder name; returns the names of these settings."""
    found = set()
    for item in fields(section):
        name, kind, value = prefix + item.name, get_type_hints(type(section))[item.name], getattr(section, item.name)
        if is_dataclass(value):
            found |= _fill_paths(value, f"{name}.")
        elif kind in (str, str | None, list[str], list[str] | str) and name not in NOT_PATHS:
            setattr(section, item.name, [FOLDER] if "list" in str(kind) else FOLDER)
            found.add(name)
    return found


def test_no_path_of_any_setting_is_sent(tmp_path):
    config, further = Config(), FurtherTeacher()
    found = _fill_paths(config) | _fill_paths(further, "teacher.also.")
    config.teacher.also = [further]
    assert {"run.dir", "data.train", "student.vision_tower", "teacher.cache", "teacher.also.lexicon"} <= found
    sent = public_config(wandb_session(config, tmp_path).config)
    assert sent["teacher"]["also"][0]["path"] == sent["student"]["path"] == "<path>"
    assert sent["student"]["lora"]["rank"] == config.student.lora.rank
    assert FOLDER not in json.dumps(sent)


def test_a_dataclass_at_any_depth_is_filtered():
    sent = public_config({"teachers": [[FurtherTeacher(path="clips/doe", name="second")]]})
    assert (sent["teachers"][0][0]["path"], sent["teachers"][0][0]["name"]) == ("<path>", "second")
