"""A whole run on line, stopped by a signal and continued: what the W&B server has in the end."""

from __future__ import annotations

import json
import signal
import socket

import pytest

from medalign.observability.metrics import find_metric
from medalign.observability.rows import read_rows
from tests.distributed.ranks import start
from tests.e2e.conftest import command, train
from tests.fake_wandb import fake_wandb


@pytest.fixture
def server(tmp_path, monkeypatch):
    with fake_wandb() as server:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


def test_a_run_that_is_preempted_and_continued_is_one_run_on_the_server(server, recipe, tmp_path):
    folder, words = tmp_path / "ward_of_doctor_doe", ("--log.wandb", "online", "--log.group", "arms")
    (process,) = start(command(recipe, folder, words), 1)
    server.wait(lambda: bool(server.runs), seconds=120)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    assert process.returncode in (0, 75)  # 0 if all steps were done before the signal
    train(recipe, folder, *words)

    (run,) = server.runs.values()
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["train/step"] for row in run.history] == [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss/total"] for row in run.history] == [row["loss/total"] for row in rows]
    names = {name for row in run.history for name in row if not name.startswith("_") and name != "train/step"}
    assert names == {name for row in rows for name in row} - {"step", "time"} and all(map(find_metric, names))
    assert run.config["environment"] == json.loads((folder / "environment.json").read_text())
    assert run.config["run"]["dir"] == run.config["data"]["train"] == run.config["student"]["path"] == "<path>"
    assert run.inputs["groupName"] == "arms" and run.exit_code == 0
    assert server.alerts[-1]["title"] == "Run finished" and len(server.alerts) == 1 + (process.returncode == 75)
    for private in ("doe", str(tmp_path), socket.gethostname()):
        assert not [path for path, body in server.requests if private.encode() in body], private
