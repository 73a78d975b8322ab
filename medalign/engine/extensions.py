"""What DeepSpeed compiles at the first start: nothing for the packaged configurations, but some settings need it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch.utils.cpp_extension import get_default_build_root

from medalign import distributed
from medalign.errors import ConfigError

log = logging.getLogger("medalign")

LOCK_TIMEOUT = 600.0  # seconds; the largest of these extensions compiles in less
_POLL = 0.2  # seconds
_REPORT = 30.0  # seconds between two messages


def prepare(settings: Mapping[str, Any], timeout: float = LOCK_TIMEOUT) -> None:
    """Warn if the start will compile an extension, and wait until no other process is compiling one.

    torch waits for the lock of an extension forever and in silence.

    Args:
        settings: a DeepSpeed configuration.
        timeout: seconds until the wait is given up.

    Raises:
        ConfigError: a lock is still there after `timeout`.
    """
    purpose = _purpose(settings)
    if not purpose or distributed.local_rank() > 0:  # the other ranks of a node wait for the first one
        return
    folder = build_folder()
    log.warning(
        "engine.deepspeed enables %s: DeepSpeed compiles an extension for it in %s, which takes minutes at the first "
        "start",
        purpose,
        folder,
    )
    _wait_for_locks(folder, timeout)


def build_timeout(settings: Mapping[str, Any]) -> float:
    """Return the seconds that the start may take longer because it compiles an extension or waits for a lock."""
    return 2 * LOCK_TIMEOUT if _purpose(settings) else 0.0


def build_folder() -> Path:
    """Return the folder in which torch builds extensions: $TORCH_EXTENSIONS_DIR or its default."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _purpose(settings: Mapping[str, Any]) -> str:
    """Return which setting needs an extension, or ""."""
    zero = settings.get("zero_optimization", {})
    offloaded = [zero.get(key) or {} for key in ("offload_param", "offload_optimizer")]
    if any(part.get("device") == "nvme" for part in offloaded):
        return "offload to NVMe"
    return "quantized communication" if any(v for k, v in zero.items() if k.startswith("zero_quantized")) else ""


def _wait_for_locks(folder: Path, timeout: float) -> None:
    begin = reported = time.monotonic()
    while held := [lock for lock in _locks(folder) if _is_held(lock)]:
        now = time.monotonic()
        if now - begin > timeout:
            raise ConfigError(
                f"another process has held {held[0]} for {timeout / 60:.0f} minutes, in which torch compiles an "
                "extension; end that process, or set TORCH_EXTENSIONS_DIR to another folder"
            )
        if reported == begin or now - reported > _REPORT:
            log.warning("waiting for another process, which holds %s", held[0])
            reported = now
        time.sleep(_POLL)


def _locks(folder: Path) -> list[Path]:
    # FOLDER/NAME/lock, or FOLDER/VERSIONS/NAME/lock if TORCH_EXTENSIONS_DIR is not set
    return sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")])


def _is_held(lock: Path) -> bool:
    """Return whether another process has locked a file. torch leaves the file behind when it releases the lock."""
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
