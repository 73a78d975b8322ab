"""File operations that survive a power failure: flush, and a pointer that changes in one rename."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def write_flushed(path: Path, text: str) -> None:
    """Replace a file by `text` in one rename, and wait until it is on the disk."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text)
    flush(scratch)
    scratch.replace(path)
    flush(path.parent)
