"""Tars that are compressed or have another ending: what they are, and how to make shards of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Packing(NamedTuple):
    magic: bytes  # the first bytes of a file
    name: str
    ending: str
    short: tuple[str, ...]  # endings that stand for ".tar" and `ending`
    command: str  # takes the file's name, and leaves the tar


_PACKINGS = (
    _Packing(b"\x1f\x8b", "gzip-compressed", ".gz", (".tgz",), "gunzip"),
    _Packing(b"\x28\xb5\x2f\xfd", "zstd-compressed", ".zst", (".tzst",), "unzstd"),
    _Packing(b"\xfd7zXZ\0", "xz-compressed", ".xz", (".txz",), "unxz"),
    _Packing(b"BZh", "bzip2-compressed", ".bz2", (".tbz", ".tbz2"), "bunzip2"),
    _Packing(b"\x04\x22\x4d\x18", "lz4-compressed", ".lz4", (), "unlz4"),
)
_POINTER = b"version https://git-lfs"
_OTHERS = {  # by the first bytes, in small letters
    b"pk\x03\x04": "a zip archive; unzip it, and pack its files with `tar --sort=name -cf`",
    _POINTER: "a pointer of Git LFS; fetch the file itself with `git lfs pull`",
    b"<!doctype html": "a web page; its download needs a login, or another address",
    b"<html": "a web page; its download needs a login, or another address",
}
_NEAR_TAR = re.compile(r"\.tar(\.(gz|zst|xz|bz2|lz4))?$|\.(tgz|tzst|txz|tbz2?|zip)$", re.IGNORECASE)


def pointer(data: bytes) -> str:
    """What a file that begins so is if it is a pointer of Git LFS, with the remedy; else ""."""
    return _OTHERS[_POINTER] if data.startswith(_POINTER) else ""


def packing_of(path: Path) -> str:
    """How a file that is no tar is packed, and what to do; "" where it is not known. To be read after "PATH is"."""
    with path.open("rb") as file:
        first = file.read(32)
    for magic, told in _OTHERS.items():
        if first.lower().startswith(magic):
            return told
    for one in _PACKINGS:
        if first.startswith(one.magic):
            packed = path.name + one.ending
            command = f"mv {path.name} {packed} && {one.command} {packed}"
            return f"{one.name}; shards are read by byte ranges, so decompress it: `{command}`"
    return ""


def without_tars(folder: Path) -> str:
    """What a folder without a .tar file is or holds instead, and what to do; to be read after its name."""
    if not folder.is_dir():
        return "is not a folder; name a folder of .tar files" if folder.exists() else "does not exist; correct the path"
    others = list(near_tars(folder))
    if others:
        return f"holds no .tar file, but {'; '.join(others)}"
    below = sorted({path.parent.name for path in folder.glob("*/*.tar")})
    if below:
        return f"holds no .tar file, but its folders {', '.join(below[:5])} do: name them instead"
    found = sorted(path.name for path in folder.iterdir())
    told = f"only {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}" if found else "it is empty"
    return f"holds no .tar file ({told}); name a folder of WebDataset shards"


def near_tars(folder: Path) -> Iterator[str]:
    """Files of a folder that are tars in another form, by ending, with what to do."""
    by_ending: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        match = _NEAR_TAR.search(path.name)
        if match and path.is_file() and path.suffix != ".tar":
            by_ending.setdefault(match[0], []).append(path.name)
    for ending, names in by_ending.items():
        files = names[0] if len(names) == 1 else f"{len(names)} files *{ending}, as {names[0]}"
        yield f"{files}: {_remedy(ending.lower())}"


def _remedy(ending: str) -> str:
    if ending == ".zip":
        return "unzip, and pack the files with `tar --sort=name -cf`"
    for one in _PACKINGS:
        if ending.endswith(one.ending) or ending in one.short:
            return f"shards are read by byte ranges, so decompress with {one.command}"
    return "rename to .tar"
