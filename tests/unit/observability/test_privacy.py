from __future__ import annotations

from pathlib import Path

from medalign.observability.privacy import public_config


def test_secrets_and_places_stay_at_home(tmp_path, monkeypatch):
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


def test_a_users_engine_file_stays_at_home():
    """A packaged name is told; a file's name, which holds what its owner likes, is not."""
    assert public_config({"engine": {"deepspeed": "zero3"}}) == {"engine": {"deepspeed": "zero3"}}
    assert public_config({"engine": {"deepspeed": "doe_cluster.json"}}) == {"engine": {"deepspeed": "<path>"}}
