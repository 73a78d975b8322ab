"""A lock of torch's extension builder is waited for, with a message and a limit, if something will be compiled."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from medalign.engine import extensions
from medalign.errors import ConfigError

NVME = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/local"}}}
CPU = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    return lock


def test_a_lock_that_stays_is_an_error_that_names_it(lock: Path) -> None:
    with pytest.raises(ConfigError, match=f"{lock} has existed.*delete this file"):
        extensions.prepare(NVME, timeout=0.05)


def test_the_lock_of_torch_s_default_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(extensions, "get_default_build_root", lambda: str(tmp_path))
    lock = tmp_path / "py311_cpu" / "quantizer" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with pytest.raises(ConfigError, match=str(lock)):
        extensions.prepare({"zero_optimization": {"zero_quantized_weights": True}}, timeout=0.05)


def test_a_lock_that_is_released_lets_the_run_continue(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Timer(0.3, lock.unlink)
    begin = time.monotonic()
    release.start()
    with caplog.at_level(logging.WARNING, "medalign"):
        extensions.prepare(NVME)
    assert 0.3 <= time.monotonic() - begin < extensions.LOCK_TIMEOUT
    assert f"waiting for another process that holds {lock}" in caplog.text


def test_settings_that_compile_nothing_do_not_wait(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "medalign"):
        extensions.prepare(CPU, timeout=0.0)
    assert not caplog.text


def test_other_ranks_of_a_node_leave_the_wait_to_the_first(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    extensions.prepare(NVME, timeout=0.0)
