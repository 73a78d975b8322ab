"""A lock of torch's extension builder is waited for, with a message and a limit, if something will be compiled."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from medalign.engine import extensions
from medalign.errors import ConfigError

NVME = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/local"}}}
CPU = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


@contextmanager
def holding(lock: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, which holds the lock as torch does while it compiles."""
    code = (
        "import sys, time, torch.utils._filelock as f\nwith f.FileLock(sys.argv[1]): print(flush=True), time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    with holding(lock):
        yield lock


def test_a_lock_that_stays_is_an_error_that_names_it(lock: Path) -> None:
    with pytest.raises(ConfigError, match=f"has held {lock} for 0 minutes.*TORCH_EXTENSIONS_DIR"):
        extensions.prepare(NVME, timeout=0.05)


def test_the_lock_of_torch_s_default_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(extensions, "get_default_build_root", lambda: str(tmp_path))
    lock = tmp_path / "py311_cpu" / "quantizer" / "lock"
    lock.parent.mkdir(parents=True)
    with holding(lock), pytest.raises(ConfigError, match=str(lock)):
        extensions.prepare({"zero_optimization": {"zero_quantized_weights": True}}, timeout=0.05)


def test_a_lock_that_is_released_lets_the_run_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    with holding(lock) as process, caplog.at_level(logging.WARNING, "medalign"):
        threading.Timer(0.5, process.kill).start()
        extensions.prepare(NVME)
    assert f"waiting for another process, which holds {lock}" in caplog.text
    caplog.clear()
    extensions.prepare(NVME)
    assert lock.exists() and "waiting" not in caplog.text  # the file stays, but nobody holds it


def test_settings_that_compile_nothing_do_not_wait(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "medalign"):
        extensions.prepare(CPU, timeout=0.0)
    assert not caplog.text


def test_other_ranks_of_a_node_leave_the_wait_to_the_first(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    extensions.prepare(NVME, timeout=0.0)


@pytest.mark.parametrize(
    ("zero", "feature"),
    [
        ({"offload_optimizer": {"device": "nvme"}}, "offload to NVMe"),
        ({"zero_quantized_gradients": True}, "quantized communication"),
        ({"offload_param": {"device": "cpu"}, "zero_quantized_weights": False, "offload_optimizer": None}, None),
    ],
)
def test_a_configuration_that_compiles_is_announced(
    zero: dict[str, object],
    feature: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with caplog.at_level(logging.WARNING, "medalign"):
        extensions.prepare({"zero_optimization": zero})
    assert (f"enables {feature}: DeepSpeed compiles an extension for it in {tmp_path}" in caplog.text) == bool(feature)
    assert bool(caplog.text) == bool(feature)


def test_the_start_may_take_longer_if_something_is_compiled() -> None:
    assert extensions.build_timeout(NVME) > extensions.LOCK_TIMEOUT and extensions.build_timeout(CPU) == 0
