"""Recognize tars that are compressed or misnamed, and explain how to turn them into shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from medalign.data.samples import git_lfs


class _Packing(NamedTuple):
    magic: bytes  # the first bytes of a file
    name: str
    ending: str
    short: tuple[str, ...]  # endings that abbreviate ".tar" + `ending`
    command: str  # decompresses the named file in place


_PACKINGS = (
    _Packing(b"\x1f\x8b", "gzip-compressed", ".gz", (".tgz",), "gunzip"),
    _Packing(b"\x28\xb5\x2f\xfd", "zstd-compressed", ".zst", (".tzst",), "unzstd"),
    _Packing(b"\xfd7zXZ\0", "xz-compressed", ".xz", (".txz",), "unxz"),
    _Packing(b"BZh", "bzip2-compressed", ".bz2", (".tbz", ".tbz2"), "bunzip2"),
    _Packing(b"\x04\x22\x4d\x18", "lz4-compressed", ".lz4", (), "unlz4"),
)
_NOT_TARS = {  # by the first bytes, in lower case
    b"pk\x03\x04": "a zip archive; unzip it, and pack its files with `tar --sort=name -cf`",
    git_lfs.POINTER: git_lfs.DESCRIPTION,
    b"<!doctype html": "a web page; the download needs a login or another address",
    b"<html": "a web page; the download needs a login or another address",
}
_NEAR_TAR = re.compile(r"\.tar(\.(gz|zst|xz|bz2|lz4))?$|\.(tgz|tzst|txz|tbz2?|zip)$", re.IGNORECASE)


def packing_of(path: Path) -> str:
    """Describe what a file that is not a tar is, and how to convert it.

    Returns:
        A phrase to follow "PATH is", or "" if the format is unknown.
    """
    with path.open("rb") as file:
        first = file.read(32)
    for magic, description in _NOT_TARS.items():
        if first.lower().startswith(magic):
            return description
    for packing in _PACKINGS:
        if first.startswith(packing.magic):
            packed = path.name + packing.ending
            command = f"mv {path.name} {packed} && {packing.command} {packed}"
            return f"{packing.name}; shards are read by byte ranges, so decompress it: `{command}`"
    return ""


def describe_missing_tars(folder: Path) -> str:
    """Describe a folder that has no .tar file, and how to fix it. The result follows the name of the folder."""
    if not folder.is_dir():
        return "is not a folder; name a folder of .tar files" if folder.exists() else "does not exist; correct the path"
    others = list(near_tars(folder))
    if others:
        return f"contains no .tar file, but {'; '.join(others)}"
    below = sorted({path.parent.name for path in folder.glob("*/*.tar")})
    if below:
        return f"contains no .tar file, but its subfolders {', '.join(below[:5])} do: name them instead"
    found = sorted(path.name for path in folder.iterdir())
    listing = f"only {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}" if found else "it is empty"
    return f"contains no .tar file ({listing}); name a folder of WebDataset shards"


def near_tars(folder: Path) -> Iterator[str]:
    """Yield one message per ending for files that are tars in another form, with the remedy."""
    by_ending: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        match = _NEAR_TAR.search(path.name)
        if match and path.is_file() and path.suffix != ".tar":
            by_ending.setdefault(match[0], []).append(path.name)
    for ending, names in by_ending.items():
        files = names[0] if len(names) == 1 else f"{len(names)} files *{ending}, for example {names[0]}"
        yield f"{files}: {_remedy(ending.lower())}"


def _remedy(ending: str) -> str:
    if ending == ".zip":
        return "unzip it and pack the files with `tar --sort=name -cf`"
    for packing in _PACKINGS:
        if ending.endswith(packing.ending) or ending in packing.short:
            return f"shards are read by byte ranges, so decompress with {packing.command}"
    return "rename to .tar"
