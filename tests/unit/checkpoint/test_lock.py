"""Only one training can use a run's folder at a time."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medalign.checkpoint import lock
from medalign.errors import ConfigError

HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
from medalign.checkpoint import lock
with lock.held(Path(sys.argv[1])):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def _try(folder: Path) -> None:
    with lock.held(folder):
        pass


def test_a_second_training_is_rejected_until_the_first_is_killed(tmp_path):
    """The loader processes of the first one, which outlive it for a while, do not keep the lock."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=rf"another training is running in {tmp_path}; .*--run\.dir"):
            _try(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        _try(tmp_path)
    finally:
        holder.kill()
        subprocess.run(["kill", "-9", str(worker)], check=False)


def test_the_lock_is_released_at_the_end(tmp_path):
    for _ in range(2):
        _try(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run" / "lock").is_file()


def test_a_file_system_without_locks_is_reported_and_accepted(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    _try(tmp_path)
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_run_dir_that_is_a_file_is_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ConfigError, match=rf"run\.dir {path} is a file"):
        _try(path)
    with pytest.raises(ConfigError, match=rf"run\.dir {path}/below cannot be written"):
        _try(path / "below")
