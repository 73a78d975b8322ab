"""Recognize the pointers that Git LFS leaves in place of files that were not fetched."""

from __future__ import annotations

POINTER = b"version https://git-lfs"  # first bytes
DESCRIPTION = "a Git LFS pointer; fetch the file itself with `git lfs pull`"


def describe_pointer(data: bytes) -> str:
    """Return what a file that begins with `data` is and the remedy if it is a pointer, otherwise ""."""
    return DESCRIPTION if data.startswith(POINTER) else ""
