"""W&B without a network: the contents of an offline run, and the effect of an unreachable server."""

from __future__ import annotations

import getpass
import json
import logging
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from wandb.proto import wandb_internal_pb2

from medalign import config
from medalign.checkpoint.state import TrainState
from medalign.distributed import log
from medalign.observability.wandb_run import WandbSink
from medalign.run import build_loggers

BLOCK, HEADER = 32768, 7  # LevelDB log framing; the file starts with a header of the same size


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    data, position, buffer = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        buffer += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(buffer)
            buffer = b""
            yield record


def history(path: Path) -> list[dict]:
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.HasField("history")
    ]


def offline_files(run_dir: Path) -> list[Path]:
    """The files of finished offline runs; the W&B process writes the last records shortly after `finish`."""
    paths = sorted(run_dir.rglob("offline-run-*/*.wandb"))
    deadline = time.monotonic() + 20
    while not all(any(record.HasField("exit") for record in records(path)) for path in paths):
        assert time.monotonic() < deadline, "W&B did not finish its file"
        time.sleep(0.05)
    return paths


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """A user without credentials, and a server that refuses connections."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    return tmp_path / "run"


def test_an_offline_run_contains_only_numbers_and_the_filtered_configuration(at_home):
    config = {"train": {"lr": 2e-4}, "run": {"dir": "/data/patients/doe"}, "hub_token": "hunter2"}
    sink = WandbSink("offline", at_home, name="trial", config=config)
    sink.log(10, {"loss/total": 2.0})
    sink.log(20, {"loss/total": 1.0, "speed/samples_per_second": 3})
    with pytest.raises(TypeError, match="'report'"):
        sink.log(30, {"report": "Small nodule."})
    with pytest.raises(TypeError, match="'picture'"):
        sink.log(30, {"picture": np.zeros((4, 4))})
    sink.close()

    (path,) = offline_files(at_home)
    rows = history(path)
    assert [(row["_step"], row["loss/total"]) for row in rows] == [(10, 2.0), (20, 1.0)]
    assert {k for row in rows for k in row if not k.startswith("_")} == {"loss/total", "speed/samples_per_second"}
    run = next(record.run for record in records(path) if record.HasField("run"))
    sent = {update.key: json.loads(update.value_json) for update in run.config.update if update.key != "_wandb"}
    assert sent == {"train": {"lr": 2e-4}, "run": {"dir": "<path>"}}
    assert run.display_name == "trial" and not run.host
    text = "".join(str(record) for record in records(path))
    for private in ("doe", "hunter2", str(at_home), str(Path.cwd())):
        assert private not in text, private
    assert not {"files", "output_raw", "stats", "environment"} & {
        record.WhichOneof("record_type") for record in records(path)
    }
    for name in (socket.gethostname(), getpass.getuser()):
        assert f'"{name}"' not in text
    assert not [
        p for p in path.parent.rglob("*") if p.name in ("requirements.txt", "wandb-metadata.json", "output.log")
    ]


def test_a_resumed_run_keeps_its_id_and_its_steps(at_home):
    for step in (10, 20):
        sink = WandbSink("offline", at_home)
        sink.log(step, {"a": 1.0})
        sink.close()
    runs = [next(r.run for r in records(path) if r.HasField("run")) for path in offline_files(at_home)]
    assert {run.run_id for run in runs} == {(at_home / "wandb_run_id").read_text().strip()}
    assert sorted(row["_step"] for path in offline_files(at_home) for row in history(path)) == [10, 20]


def test_a_run_is_named_by_its_id_unless_it_is_given_a_name(at_home):
    """With the sinks of a run: neither the folder's name nor that of the user's engine file is sent."""
    folder = at_home / "ward_of_doctor_doe"
    words = ["--data.train", "c", "--run.dir", str(folder), "--engine.deepspeed", "doe_cluster.json"]
    for name in (None, "trial"):
        settings = config.load("phantom", [*words, *(["--log.name", name] if name else [])])
        for logger in build_loggers(settings, folder, TrainState(step=0, samples=0, ranks=1)):
            logger.close()
    found = [list(records(path)) for path in offline_files(folder)]
    assert not any("doe" in str(record) for run in found for record in run)
    names = {record.run.display_name for run in found for record in run if record.HasField("run")}
    assert names == {"trial", (folder / "wandb_run_id").read_text().strip()}


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_an_unreachable_server_leaves_the_run_offline_with_one_warning(at_home, monkeypatch, caplog, key):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING, logger=log.name)
    sink = WandbSink("online", at_home, init_timeout=3, finish_timeout=3)
    sink.log(10, {"a": 1.0})
    sink.close()
    messages = [record.getMessage() for record in caplog.records if record.name == log.name]
    assert len(messages) == 1 and "offline" in messages[0]
    assert [row["a"] for path in offline_files(at_home) for row in history(path)] == [1.0]
