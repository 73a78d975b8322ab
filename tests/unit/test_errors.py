"""The exit status says whether the user can correct the reason, which decides whether a run is started again."""

from __future__ import annotations

import pytest

from medalign.errors import ConfigError, Preempted, exit_status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("train.lr is -1"), 2),
        (PermissionError("runs/first"), 2),
        (Preempted("SIGUSR1"), 75),
        (KeyboardInterrupt(), 130),
        (ConnectionResetError("reset by peer"), 1),  # what a rank sees of a worker of its loader that was killed
        (RuntimeError("a rank is gone"), 1),
    ],
)
def test_the_status_of_a_process_that_an_exception_ends(error, status):
    assert exit_status(error) == status
