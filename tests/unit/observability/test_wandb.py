"""W&B without a network: the contents of an offline run, and the effect of an unreachable server."""

from __future__ import annotations

import getpass
import json
import logging
import math
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from wandb.proto import wandb_internal_pb2

from medalign import config
from medalign.__main__ import main
from medalign.checkpoint.state import TrainState
from medalign.cli.wandb import evaluation_scores
from medalign.config import LogConfig
from medalign.distributed import log
from medalign.observability import wandb_sink
from medalign.observability.wandb_session import WandbSession, run_id
from medalign.observability.wandb_sink import WandbSink, sync
from medalign.run_folder import RunFolder
from medalign.training.loggers import build_loggers
from tests.fake_wandb import fake_wandb

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


def offline_files(run_dir: Path, ended: int | None = None) -> list[Path]:
    """The files of offline runs, of which `ended` (by default all) have ended.

    The W&B process writes the last records shortly after `finish`.
    """
    paths = sorted(run_dir.rglob("offline-run-*/*.wandb"))
    deadline = time.monotonic() + 20
    while sum(any(record.HasField("exit") for record in records(path)) for path in paths) < (ended or len(paths)):
        assert time.monotonic() < deadline, "W&B did not finish its file"
        time.sleep(0.05)
    return paths


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """A user without credentials, and a server that refuses connections."""
    wandb.teardown()  # of another test's session
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    return tmp_path / "run"


def test_an_offline_run_contains_only_numbers_and_the_filtered_configuration(at_home):
    config = {"train": {"lr": 2e-4}, "run": {"dir": "/data/patients/doe"}, "hub_token": "hunter2"}
    names = LogConfig(name="trial", group="arms", job_type="pilot", tags=["a", "b"], notes="first try")
    sink = WandbSink("offline", WandbSession(at_home, names, config=config))
    sink.log(10, {"loss/total": 2.0})
    sink.log(20, {"loss/total": 1.0, "speed/samples_per_second": 3})
    with pytest.raises(TypeError, match="'report'"):
        sink.log(30, {"report": "Small nodule."})
    with pytest.raises(TypeError, match="'picture'"):
        sink.log(30, {"picture": np.zeros((4, 4))})
    sink.alert("Run preempted", "Stopped after step 20.", "WARN")
    sink.close(75, preempted=True)

    (path,) = offline_files(at_home)
    rows = history(path)
    assert [(row["_step"], row["loss/total"]) for row in rows] == [(10, 2.0), (20, 1.0)]
    names = {"loss/total", "speed/samples_per_second", "train/step"}
    assert {k for row in rows for k in row if not k.startswith("_")} == names
    run = next(record.run for record in records(path) if record.HasField("run"))
    sent = {update.key: json.loads(update.value_json) for update in run.config.update if update.key != "_wandb"}
    assert sent == {"train": {"lr": 2e-4}, "run": {"dir": "<path>"}}
    assert run.display_name == "trial" and not run.host
    assert (run.run_group, run.job_type, list(run.tags), run.notes) == ("arms", "pilot", ["a", "b"], "first try")
    found = list(records(path))
    assert [(r.alert.title, r.alert.level) for r in found if r.HasField("alert")] == [("Run preempted", "WARN")]
    metrics = [r.metric for r in found if r.HasField("metric")]
    assert [(m.name or m.glob_name, m.step_metric) for m in metrics] == [("train/step", ""), ("*", "train/step")]
    assert [r.exit.exit_code for r in found if r.HasField("exit")] == [75]
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
        sink = WandbSink("offline", WandbSession(at_home))
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
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 1 and torch.__version__.startswith(environment["versions"]["torch"])
    for run in found:
        settings = next(record.run.config for record in run if record.HasField("run"))
        sent = {update.key: json.loads(update.value_json) for update in settings.update}
        assert sent["environment"] == environment


def test_the_scores_of_evaluations_are_sent_if_wanted(tmp_path):
    folder = RunFolder(tmp_path).evaluation("val").scores
    folder.parent.mkdir(parents=True)
    folder.write_text('{"closed_accuracy": 0.5, "n": 8, "name": "val", "interval": [0.1, 0.2], "data": "/doe"}')
    assert evaluation_scores(RunFolder(tmp_path)) == {"evaluation/val/closed_accuracy": 0.5, "evaluation/val/n": 8}


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_an_unreachable_server_leaves_the_run_offline_with_one_warning(at_home, monkeypatch, caplog, key):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING, logger=log.name)
    sink = WandbSink("online", WandbSession(at_home, init_timeout=3, finish_timeout=3))
    sink.log(10, {"a": 1.0})
    sink.close()
    messages = [record.getMessage() for record in caplog.records if record.name == log.name]
    assert len(messages) == 1 and "offline" in messages[0]
    assert [row["a"] for path in offline_files(at_home) for row in history(path)] == [1.0]


START = """
import os, signal, sys
from pathlib import Path
from medalign.observability.rows import JsonlSink, read_rows
from medalign.observability.wandb_session import WandbSession
from medalign.observability.wandb_sink import WandbSink

folder, resumed, last, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
metrics = JsonlSink(folder / "metrics.jsonl", resumed_step=resumed)
rows = read_rows(folder / "metrics.jsonl")
sinks = [WandbSink(mode, WandbSession(folder / mode), rows=rows, last_step=30) for mode in ("offline", "online")]
for step in range(resumed + 1, last + 1):
    for sink in (metrics, *sinks):
        sink.log(step, {"loss/total": 1 / step})
        if step % 10 == 0:
            sink.log(step, {"validation/loss/total": 2 / step})
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
for sink in (metrics, *sinks):
    sink.close()
"""


def test_after_kills_and_a_preemption_there_is_one_whole_history(at_home, monkeypatch):
    """Each start resumes from a checkpoint, which may be earlier or later than what W&B has.

    On line, W&B sends nothing in the first 15 seconds unless the run ends in order.
    """
    at_home.mkdir()
    sent = []
    with fake_wandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        for resumed, last, end in ((0, 8, "kill"), (8, 15, "stop"), (10, 23, "kill"), (20, 30, "stop")):
            words = [sys.executable, "-c", START, str(at_home), str(resumed), str(last), end]
            found = subprocess.run(words, timeout=120, check=False)
            assert found.returncode == (-signal.SIGKILL if end == "kill" else 0)
            sent.append(len(server.history))
        (online,) = server.runs.values()
    assert sent == [0, 14, 14, 30]  # step 15 waited for what the next start might have added to it
    offline = max(offline_files(at_home / "offline", ended=2), key=lambda path: len(history(path)))
    for rows in (history(offline), online.history):
        assert [row["_step"] for row in rows] == list(range(1, 31))
        assert [row["train/step"] for row in rows] == list(range(1, 31))
        assert [row["loss/total"] for row in rows] == [1 / step for step in range(1, 31)]
        validated = {row["_step"]: row["validation/loss/total"] for row in rows if "validation/loss/total" in row}
        assert validated == {10: 0.2, 20: 0.1, 30: 2 / 30}


class FakeRun:
    """A run on a server that has the steps before `starting_step`."""

    def __init__(self, starting_step: int = 0) -> None:
        self.starting_step = starting_step
        self.rows: list[tuple[int, dict]] = []
        self.summary: dict[str, float] = {}
        self.finished = False

    def log(self, values, step):
        self.rows.append((step, dict(values)))

    def finish(self, exit_code=0):
        self.finished = True


def test_a_resumed_run_on_line_gets_each_missing_step_once(at_home, monkeypatch):
    """The server has steps 1 to 3; the checkpoint is that of step 4, so the trainer will not take step 4 again."""
    run = FakeRun(starting_step=4)
    monkeypatch.setattr(WandbSession, "start_online", lambda session: run)
    rows = [{"step": step, "time": "", "a": float(step)} for step in range(1, 5)] + [{"step": 4, "time": "", "b": None}]
    sink = WandbSink("online", WandbSession(at_home), rows=rows, last_step=8)
    sink.log(5, {"a": 5.0})
    sink.log(6, {"a": 6.0})
    sink.close()
    (fourth, fifth) = run.rows
    assert fourth[0] == 4 and fourth[1]["a"] == 4.0 and math.isnan(fourth[1]["b"])
    assert fifth == (5, {"a": 5.0, "train/step": 5})  # step 6 may get a validation by the next start, which sends it
    assert run.finished


def test_the_agent_of_a_sweep_chooses_the_id_of_a_new_run(at_home, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert run_id(at_home / "first") == "abc123"
    monkeypatch.setenv("WANDB_RUN_ID", "def456")
    assert run_id(at_home / "first") == "abc123"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert run_id(at_home / "second") != "def456"


def test_sync_sends_the_missing_steps(at_home, monkeypatch):
    run = FakeRun(starting_step=2)
    monkeypatch.setattr(WandbSession, "start_online", lambda session: run)
    assert sync(WandbSession(at_home), [{"step": step, "time": "", "a": 1.0} for step in (1, 2, 3)]) == 2
    assert [step for step, _ in run.rows] == [2, 3] and run.finished


def test_sync_without_a_server_is_an_error_of_the_command(at_home, capsys):
    at_home.mkdir()
    settings = config.load("phantom", ["--data.train", "c", "--run.dir", str(at_home)])
    (at_home / "config.yaml").write_text(config.dump(settings))
    assert main(["wandb", "sync", str(at_home)]) == 2
    assert "metrics.jsonl does not exist" in capsys.readouterr().err
    (at_home / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n')
    assert main(["wandb", "sync", str(at_home)]) == 2
    assert "was not sent; log in with `wandb login`" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["start", "log", "finish"])
def test_whatever_fails_in_wandb_ends_nothing(at_home, monkeypatch, caplog, moment):
    def fail(*_, **__):
        raise AssertionError("the service process is gone")

    run = FakeRun()
    monkeypatch.setattr(WandbSession, "start_offline", fail if moment == "start" else lambda session: run)
    monkeypatch.setattr(FakeRun, moment, fail, raising=False)
    sink = WandbSink("offline", WandbSession(at_home))
    for step in (1, 2, 3):
        sink.log(step, {"a": 1.0})
    sink.close()
    assert caplog.text.count("W&B failed (AssertionError: the service process is gone)") == 1
    assert f"medalign wandb sync {at_home}" in caplog.text


def test_a_service_that_hangs_delays_nothing(at_home, monkeypatch, caplog):
    class Hanging(FakeRun):
        def log(self, values, step):
            threading.Event().wait()

    monkeypatch.setattr(WandbSession, "start_offline", lambda session: Hanging())
    monkeypatch.setattr(wandb_sink, "_MARGIN", 0.1)
    sink = WandbSink("offline", WandbSession(at_home, init_timeout=0.1, finish_timeout=0.1))
    began = time.monotonic()
    for step in range(1, 1000):
        sink.log(step, {"a": 1.0})
    assert time.monotonic() - began < 20  # 1000 rows go into a queue; the service would hold each for ever
    sink.close()
    assert "W&B has not finished within 0 s" in caplog.text


SERVICE_DIES = """
import os, signal, sys, time
from pathlib import Path
from medalign.observability.wandb_session import WandbSession
from medalign.observability.wandb_sink import WandbSink

folder = Path(sys.argv[1])
sink = WandbSink("offline", WandbSession(folder, finish_timeout=5))
sink.log(1, {"a": 1.0})
children = lambda: Path(f"/proc/{os.getpid()}/task").glob("*/children")
deadline = time.monotonic() + 60
while not list(folder.rglob("*.wandb")):
    assert time.monotonic() < deadline
    time.sleep(0.1)
for pid in {pid for path in children() for pid in path.read_text().split()}:
    os.kill(int(pid), signal.SIGKILL)
for step in (2, 3):
    sink.log(step, {"a": 1.0})
sink.close()
"""


def test_a_killed_service_leaves_the_run_its_exit_status(at_home):
    at_home.mkdir()
    words = [sys.executable, "-c", SERVICE_DIES, str(at_home)]
    found = subprocess.run(words, timeout=120, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "medalign wandb sync" in found.stderr
