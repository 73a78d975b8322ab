from __future__ import annotations

from pathlib import Path

from medalign.observability.privacy import public_config


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
