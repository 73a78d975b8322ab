"""W&B on line, against a small server: what it is sent, and what happens where it fails."""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import wandb

from medalign.config import Config
from medalign.config.schema.run import LogConfig
from medalign.distributed import log
from medalign.errors import DataError, DivergedError, Preempted
from medalign.observability.wandb_session import WandbSession, end_service
from medalign.observability.wandb_sink import WandbSink, sync
from medalign.training.callbacks import WandbLogger
from tests.fake_wandb import fake_wandb

SECRET = "1234567890" * 4
ROWS = [{"step": step, "time": "", "a": float(step)} for step in (1, 2, 3)]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server, and a user who is logged in."""
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    with fake_wandb() as server:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server
        end_service()
        wandb.teardown()  # forgets the key


def session(folder: Path, seconds: float = 20.0, **config: object) -> WandbSession:
    return WandbSession(folder, LogConfig(), config, init_timeout=seconds, finish_timeout=seconds)


def services() -> list[psutil.Process]:
    """W&B's processes of this one."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith("wandb-core") and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == log.name]


def test_a_server_is_sent_numbers_and_settings_only(server, tmp_path):
    names = LogConfig(group="arms", job_type="pilot", tags=["a"], notes="first try")
    folder = tmp_path / "ward_of_doctor_doe"
    sink = WandbSink("online", WandbSession(folder, names, {"run": {"dir": str(folder)}, "train": {"lr": 1e-4}}))
    sink.log(10, {"loss/total": 2.0})
    sink.alert("Run preempted", "Stopped by a signal.", "WARN")
    sink.close(75, preempted=True)

    (run,) = server.runs.values()
    assert [(row["_step"], row["train/step"], row["loss/total"]) for row in run.history] == [(10, 10, 2.0)]
    assert run.config == {"run": {"dir": "<path>"}, "train": {"lr": 1e-4}}
    assert {name: run.inputs[name] for name in ("groupName", "jobType", "tags", "notes")} == {
        "groupName": "arms",
        "jobType": "pilot",
        "tags": ["a"],
        "notes": "first try",
    }
    assert (run.exit_code, run.preempting) == (75, True)
    assert [(alert["title"], alert["severity"]) for alert in server.alerts] == [("Run preempted", "WARN")]
    assert set(run.files) <= {"wandb-history.jsonl", "wandb-summary.json"}
    assert set(run.uploads) <= {"wandb-summary.json", "config.yaml"}
    for private in ("doe", str(Path.cwd()), str(tmp_path), socket.gethostname(), getpass.getuser() + '"', SECRET):
        assert not [path for path, body in server.requests if private.encode() in body], private
    assert not [path for path, _ in server.requests if "otel" in path]


def test_system_metrics_are_sent_if_wanted(tmp_path):
    for wanted in (True, False):
        settings = WandbSession(tmp_path, LogConfig(system_metrics=wanted))._library_settings()
        assert settings.x_disable_stats is not wanted and settings.x_disable_meta and settings.x_disable_machine_info


@pytest.mark.parametrize("fault", ["error", "garbage", "slow"])
def test_a_server_that_fails_at_the_start_leaves_the_run_offline(server, tmp_path, caplog, fault):
    """The rows are in the run's folder, and are sent once the server answers."""
    server.fault = fault
    began = time.monotonic()
    sink = WandbSink("online", session(tmp_path / "run", seconds=3))
    for row in ROWS:
        sink.log(row["step"], {"a": row["a"]})
    assert time.monotonic() - began < 2.5, "starting W&B and logging do not wait for the server"
    sink.close()
    assert time.monotonic() - began < 3 + 3 + 5 + 15  # time-outs, margin, a busy machine; the server takes 60 s
    assert len(messages(caplog)) == 1 and "offline" in messages(caplog)[0]
    assert list(tmp_path.rglob("offline-run-*/*.wandb")) and server.history == []
    server.fault = ""
    assert sync(session(tmp_path / "run"), ROWS, {"evaluation/val/bleu": 0.5}) == 3
    assert [row["a"] for row in server.history] == [1.0, 2.0, 3.0]
    (run,) = server.runs.values()
    assert json.loads(run.uploads["wandb-summary.json"])["evaluation/val/bleu"] == 0.5


@pytest.mark.parametrize("fault", ["error", "slow", "refused"])
def test_a_server_that_fails_in_the_middle_delays_nothing(server, tmp_path, caplog, fault):
    """One warning names the remedy, which then sends every row once."""
    sink = WandbSink("online", session(tmp_path / "run", seconds=1))
    sink.log(1, {"a": 1.0})
    server.wait(lambda: bool(server.runs))
    server.fault = fault
    for row in ROWS[1:]:
        sink.log(row["step"], {"a": row["a"]})
    began = time.monotonic()
    sink.close()
    assert time.monotonic() - began < 1 + 1 + 5 + 15
    assert len(messages(caplog)) == 1 and f"medalign wandb sync {tmp_path / 'run'}" in messages(caplog)[0]
    assert not services()
    server.fault = ""
    sync(session(tmp_path / "run"), ROWS)
    assert [row["a"] for row in server.history] == [1.0, 2.0, 3.0]


PREEMPTED = """
import sys, time
from pathlib import Path
from medalign.observability import wandb_sink
from medalign.observability.wandb_session import WandbSession

wandb_sink._BRIEFLY = 1.0
sink = wandb_sink.WandbSink("online", WandbSession(Path(sys.argv[1])))
sink.log(1, {"a": 1.0})
time.sleep(1)
sink.close(75, preempted=True, briefly=True)
print(time.time())
"""


def test_a_process_that_is_preempted_exits_although_the_server_hangs(server, tmp_path):
    """The library's exit hook would wait for the server."""
    server.fault = "slow"
    words = [sys.executable, "-c", PREEMPTED, str(tmp_path / "run")]
    found = subprocess.run(words, timeout=60, check=True, capture_output=True, text=True)
    assert time.time() - float(found.stdout) < 30
    assert "has not finished within 1 s" in found.stderr and "Traceback" not in found.stderr


class Recorder:
    """A sink that keeps what it is handed."""

    def __init__(self) -> None:
        self.alerts: list[tuple[str, str]] = []
        self.closed: dict[str, object] = {}

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append((level, f"{title}. {text}"))

    def close(self, status: int = 0, **how: object) -> None:
        self.closed = {"status": status, **how}


def trainer(step: int, diverged: int = 0, begun: int = 0) -> SimpleNamespace:
    state = SimpleNamespace(step=step, diverged=diverged)
    return SimpleNamespace(state=state, begun=SimpleNamespace(step=begun), total_steps=9, config=Config())


def test_a_step_that_is_left_out_is_an_alert_once():
    sink = Recorder()
    logger = WandbLogger(sink)
    logger.on_train_start(trainer(2, diverged=1))
    for step, diverged in ((3, 1), (4, 2), (5, 2)):
        logger.on_step_end(trainer(step, diverged))
    assert [level for level, _ in sink.alerts] == ["WARN"]
    assert "The update of step 4 was left out: 2 of at most 5 steps so far." in sink.alerts[0][1]


def test_a_run_that_ends_is_an_alert_unless_it_was_finished_before():
    sink = Recorder()
    WandbLogger(sink).on_train_end(trainer(9, begun=9))
    assert sink.alerts == []
    WandbLogger(sink).on_train_end(trainer(9))
    assert sink.alerts == [("INFO", "Run finished. All 9 steps are done.")]


@pytest.mark.parametrize(
    ("error", "level", "text", "closed"),
    [
        (Preempted("x"), "WARN", "Run preempted. Stopped", {"status": 75, "preempted": True, "briefly": True}),
        (
            DivergedError("/secret/doe"),
            "ERROR",
            "Run diverged. Loss or gradient not finite",
            {"status": 1},
        ),
        (DataError("/secret/doe"), "ERROR", "Run failed. DataError after step 4 of 9.", {"status": 1}),
    ],
)
def test_a_run_that_fails_is_an_alert_without_its_message(error, level, text, closed):
    sink = Recorder()
    WandbLogger(sink).on_exception(trainer(4), error)
    ((found, message),) = sink.alerts
    assert found == level and message.startswith(text) and "doe" not in message
    assert sink.closed == closed


def test_a_run_that_hangs_is_an_alert():
    sink = Recorder()
    WandbLogger(sink).on_hang(trainer(4))
    assert sink.alerts[0][0] == "ERROR" and "No progress after step 4" in sink.alerts[0][1]
    assert sink.closed == {"status": 124, "briefly": True}
