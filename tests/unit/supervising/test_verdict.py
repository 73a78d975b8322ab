"""How a start ended: the ranks' own records count for more than the status of a launcher."""

from __future__ import annotations

import signal

import pytest

from medalign.exit_records import ExitRecord
from medalign.supervising.verdict import judge


def record(rank: int, status: int, reason: str = "", time: float = 0.0) -> ExitRecord:
    return ExitRecord(rank, 2, time, status, reason)


LOST = "RuntimeError: Connection closed by peer"


@pytest.mark.parametrize(
    ("records", "launcher", "status", "crashed", "reason"),
    [
        ([record(0, 0), record(1, 0)], 0, 0, False, ""),
        ([record(0, 2, "data.train x does not exist"), record(1, 1, LOST)], 143, 2, False, "rank 0: data.train x does"),
        ([record(1, 75, "SIGUSR1: stopped after step 4")], 143, 75, False, "rank 1: SIGUSR1"),
        ([record(0, 143, "SIGTERM: stopped after step 4"), record(1, 1, LOST)], 1, 143, False, "rank 0: SIGTERM"),
        ([record(0, 130)], 1, 130, False, "rank 0"),
        ([record(1, 1, "ZeroDivisionError: x"), record(0, 1, LOST)], 143, 1, True, "rank 1: ZeroDivisionError: x"),
        ([record(0, 1, LOST)], 143, 1, True, f"rank 0: {LOST}; no reason from rank 1: killed"),
        ([record(0, 124, "the run hangs: x"), record(1, 0)], 143, 124, True, "rank 0: the run hangs: x"),
        ([], -9, 137, True, "no rank has left a reason: they were killed, or did not start"),
        ([], 2, 2, False, "the launcher refused its command"),
        ([], 138, 75, False, "SIGUSR1 asked for the end"),  # in the start, before the ranks were ready
        ([record(1, 0)], 0, 1, True, "no reason from rank 0"),  # the launcher reports success, and rank 0 does not
        ([], 0, 1, True, "no rank has left a reason"),
    ],
)
def test_the_end_of_a_start(records, launcher, status, crashed, reason):
    found = judge(records, launcher, None)
    assert (found.status, found.crashed) == (status, crashed)
    assert found.reason.startswith(reason)


def test_what_was_asked_to_end_is_not_a_crash():
    found = judge([record(0, 1, LOST)], 143, signal.SIGTERM)
    assert (found.status, found.crashed) == (143, False) and "SIGTERM asked" in found.reason
    assert judge([record(0, 1, LOST)], 143, signal.SIGUSR1).status == 75
    assert judge([record(0, 0), record(1, 0)], 0, signal.SIGTERM).status == 0  # it came too late
