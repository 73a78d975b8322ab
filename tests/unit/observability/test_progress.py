from __future__ import annotations

import io
import logging

import pytest

from medalign.distributed import log
from medalign.observability.progress import ProgressReporter, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def lines(caplog, monkeypatch):
    """The messages of the project's logger."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger=log.name)
    return caplog


def work(stream: io.StringIO, seconds: float) -> None:
    """Ten batches of four samples, `seconds` each."""
    now = 0.0
    with ProgressReporter("evaluate", 40, "samples", interval=30, stream=stream, clock=lambda: now) as progress:
        for _ in range(10):
            now += seconds
            progress.add(4)


def test_a_log_gets_lines_at_intervals_with_the_remaining_time(lines):
    stream = io.StringIO()
    work(stream, seconds=20)
    assert lines.messages == [
        "evaluate: 40 samples",
        "evaluate: 4 of 40 samples, 3:00 left",  # after the first batch, at 20 s
        "evaluate: 12 of 40 samples, 2:20 left",  # then 30 s later at the earliest: at 60, 100, 140, 180 s
        "evaluate: 20 of 40 samples, 1:40 left",
        "evaluate: 28 of 40 samples, 1:00 left",
        "evaluate: 36 of 40 samples, 0:20 left",
        "evaluate: 40 of 40 samples in 3:20",
    ]
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_no_lines(lines):
    stream = Terminal()
    work(stream, seconds=20)
    assert lines.messages == [] and "40/40" in stream.getvalue() and "evaluate" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_report_nothing(stream, lines, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    work(stream, seconds=60)
    assert lines.messages == [] and stream.getvalue() == ""


def test_failed_work_is_not_reported_as_done(lines):
    with pytest.raises(KeyError), ProgressReporter("evaluate", 40, "samples") as progress:
        progress.add(4)
        raise KeyError
    assert len(lines.messages) == 2 and lines.messages[-1].startswith("evaluate: 4 of 40 samples")


def test_durations():
    assert [duration(seconds) for seconds in (7.9, 307, 3907)] == ["0:07", "5:07", "1:05:07"]
