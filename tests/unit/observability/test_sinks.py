from __future__ import annotations

import io
import json
import logging
import math
import resource
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from medalign.distributed import log
from medalign.errors import DataError
from medalign.observability.console import ConsoleSink, summary
from medalign.observability.rows import JsonlSink, read_rows
from medalign.observability.sinks import to_python_numbers


@pytest.fixture
def lines(caplog, monkeypatch):
    """The messages of the project's logger."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger=log.name)
    return caplog


def test_only_numbers():
    assert to_python_numbers({"a": 1, "b": np.float32(0.5)}) == {"a": 1, "b": 0.5}
    with pytest.raises(TypeError, match="'report' is str"):
        to_python_numbers({"report": "No effusion."})


def test_jsonl_rows_are_written_at_once(tmp_path):
    times = iter([datetime(2026, 3, 1, 23, 59, 59, 999_500, UTC), datetime(2026, 3, 2, tzinfo=UTC)])
    sink = JsonlSink(tmp_path / "run" / "metrics.jsonl", clock=lambda: next(times))
    sink.log(10, {"loss/total": 1.5})
    first = {"step": 10, "time": "2026-03-01T23:59:59.999+00:00", "loss/total": 1.5}
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == [first]
    sink.log(20, {"loss/total": math.nan})
    sink.close()
    text = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(text[1]) == {"step": 20, "time": "2026-03-02T00:00:00.000+00:00", "loss/total": None}


def test_a_row_has_the_current_time_and_keeps_it_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = datetime.now(UTC)
    sink = JsonlSink(path)
    sink.log(1, {"a": 1.0})
    sink.close()
    (row,) = read_rows(path)
    written = datetime.fromisoformat(row["time"])
    assert written.utcoffset() == timedelta(0) and abs(written - before) < timedelta(minutes=1)
    JsonlSink(path, resumed_step=1).close()
    assert read_rows(path) == [row]


def test_resuming_drops_later_rows_and_a_partial_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "a": 1.0}\n{"step": 20, "a": 2.0}\n{"step": 30, "a": 3.0}\n{"step": 40, "a')
    sink = JsonlSink(path, resumed_step=20)
    sink.log(30, {"a": 4.0})
    sink.close()
    assert [(row["step"], row["a"]) for row in read_rows(path)] == [(10, 1.0), (20, 2.0), (30, 4.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "tail", [bytes(300), bytes(10) + b"\n" + bytes(10), b'{"st\0\0\0\n', b"\n\n", b'20, "a": 2.0}\n{"x"\n']
)
def test_a_torn_end_is_dropped(tmp_path, caplog, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10, "a": 1.0}\n' + tail)
    caplog.set_level(logging.INFO, logger=log.name)
    assert [row["step"] for row in read_rows(path)] == [10]
    assert "metrics.jsonl" in caplog.text and "not a complete row" in caplog.text
    JsonlSink(path, resumed_step=10).close()
    assert path.read_text() == '{"step": 10, "a": 1.0}\n'


def test_rows_are_caught_up_after_a_full_disk(tmp_path, caplog):
    """No file may grow beyond 150 bytes for a while, which is inside a row."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))
    try:
        for step in range(1, 6):
            sink.log(step, {"a": 1.0})
        assert path.stat().st_size == 150
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("cannot be written") == 1
    sink.log(6, {"a": 1.0})
    sink.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4, 5, 6]
    assert "metrics.jsonl is written again" in caplog.text and "lost" not in caplog.text


def test_rows_that_never_fit_are_reported(tmp_path, caplog):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        sink.log(1, {"a": 1.0})
        sink.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "metrics.jsonl: 1 rows are lost" in caplog.text


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "a": 1.0}\n')
    JsonlSink(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize(
    "line", ["{broken", "[1]", '{"a": 1}', "\ud800".encode("utf-8", "surrogatepass").decode("latin1")]
)
def test_a_broken_line_in_the_middle_is_an_error(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n', encoding="latin1")
    with pytest.raises(DataError, match="line 2"):
        JsonlSink(path)


VALUES = {"loss/total": 2.0, "loss/language": 1.25, "optim/lr": 2e-4, "speed/samples_per_second": 12.34}


def test_summary_is_short():
    assert summary(VALUES) == "total 2  language 1.25  lr 2.00e-04  12.3 samples/s"


def test_console_writes_lines_at_intervals_outside_a_terminal(lines):
    now = [0.0]
    sink = ConsoleSink(100, stream=io.StringIO(), interval=10, clock=lambda: now[0])
    for step in range(10, 60, 10):
        now[0] += 4
        sink.tick(step)
        sink.log(step, VALUES)
    sink.close()
    steps = [record.getMessage().split("  ")[0] for record in lines.records]
    assert steps == ["step 10/100", "step 40/100", "step 50/100"]
    assert lines.records[0].getMessage().endswith("left 0:36")


def test_console_draws_a_bar_on_request(lines):
    stream = io.StringIO()
    sink = ConsoleSink(20, start=10, bar=True, stream=stream)
    sink.tick(15)
    sink.log(20, VALUES)
    sink.close()
    assert "20/20" in stream.getvalue() and "language 1.25" in stream.getvalue()
    assert not lines.records


def test_wandb_off_never_imports_it(tmp_path):
    program = (
        "import sys, pathlib; from medalign.observability.wandb_sink import WandbSink\n"
        "from medalign.observability.wandb_session import WandbSession\n"
        f"sink = WandbSink('off', WandbSession(pathlib.Path({str(tmp_path)!r})))\n"
        "sink.log(1, {'a': 1.0}); sink.close()\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'wandb']"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not list(tmp_path.iterdir())
