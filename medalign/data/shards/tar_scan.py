"""List the members of a tar and the location of their bytes from its headers; links are resolved to their targets.

Several archives in one file, as `cat a.tar b.tar` writes them, are read as one. Any other data after an end mark, or a
tar without an end mark, is an error, because members may be missing.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from medalign.data.shards.archives import packing_of
from medalign.errors import DataError

_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE  # bytes; tars are padded with zeros to full records
_CHUNK = 1 << 20  # bytes searched at a time
_COPY_AGAIN = "copy it again or leave it out"
_MALFORMED = (tarfile.TarError, ValueError, OverflowError, LookupError)  # raised by tarfile for a broken header


@dataclass(frozen=True, slots=True)
class TarMember:
    """One file of a tar."""

    name: str  # as in the tar, without a leading "./"
    offset: int  # bytes
    length: int  # bytes
    link: str = ""  # name of the link target; "" for a file or a resolved link
    fault: str = ""  # why its bytes cannot be read; follows "member NAME"


def scan(path: Path, notes: list[str]) -> list[TarMember]:
    """List the files of a tar in order, without folders.

    Args:
        path: the tar.
        notes: remarks about this tar for the user are added.

    Raises:
        DataError: the file is not a tar, or is damaged.
    """
    members: list[TarMember] = []
    start: int | None = 0
    with path.open("rb") as file:
        while start is not None:
            before = len(members)
            end = _read_archive(path, file, start, members)
            if start:
                notes.append(
                    f"{path.name}: another archive begins at byte {start}, after an end mark; "
                    f"its {len(members) - before} files are also read"
                )
            start = _next_archive(path, file, end)
    return _resolve_links(members)


def _read_archive(path: Path, file: BinaryIO, start: int, members: list[TarMember]) -> int:
    """Append the members of the archive that begins at byte `start`, and return the byte where they end."""
    file.seek(start)
    try:
        with tarfile.TarFile(fileobj=file, encoding="utf-8") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                if info.size < 0:
                    raise tarfile.ReadError(f"{info.name} has {info.size} bytes")  # tarfile would loop forever
                if not info.isdir():
                    members.append(_member(info))
            return tar.offset
    except _MALFORMED as error:
        raise DataError(_unreadable(path, members, error)) from error


def _member(info: tarfile.TarInfo) -> TarMember:
    name, link, fault = info.name.removeprefix("./"), "", ""
    if info.islnk():
        link = posixpath.normpath(info.linkname)
    elif info.issym():
        link = posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname))
    elif info.issparse():
        fault = "is a sparse file, whose bytes are not contiguous; pack it without --sparse"
    elif not info.isreg():
        kind = "a device" if info.ischr() or info.isblk() else "a FIFO" if info.isfifo() else f"of type {info.type!r}"
        fault = f"is {kind}, not a file"
    return TarMember(name, info.offset_data, info.size, link, fault)


def _unreadable(path: Path, members: Sequence[TarMember], error: Exception) -> str:
    """Explain why a tar cannot be read, and the remedy."""
    packing = packing_of(path)
    if packing:
        return f"{path} is {packing}"
    if members:
        last, size = members[-1], path.stat().st_size
        if last.offset + last.length > size:
            return (
                f"{path} is truncated: it has {size} bytes, and {last.name} ends at byte {last.offset + last.length}; "
                f"it is not a readable tar ({error}); {_COPY_AGAIN}"
            )
        return f"{path} is not a readable tar after {last.name} ({error}); {_COPY_AGAIN}"
    return f"{path} is not a readable tar ({error}); {_COPY_AGAIN}"


def _next_archive(path: Path, file: BinaryIO, end: int) -> int | None:
    """Return the byte where another archive begins after the one that ends at `end`, or None.

    Archives fill full records, so a header at any other position is left over from a damaged archive.

    Raises:
        DataError: there is no end mark, or something other than zeros or an archive follows it.
    """
    size = file.seek(0, 2)
    if end >= size:
        raise DataError(
            f"{path} ends at byte {size} without the blocks of zeros that end a tar: it may be truncated between two "
            f"members; {_COPY_AGAIN}, or, if it is complete, end it with `truncate -s +1024 {path.name}`"
        )
    start = _first_nonzero(file, end)
    if start is None:
        return None
    start -= start % _BLOCK
    if start > end and start % _RECORD == 0 and _is_header(file, start):
        return start
    zeros = f"{start - end} bytes of zeros and then " if start > end else ""
    raise DataError(
        f"{path} is damaged: at byte {end}, where a member or the end is expected, there are {zeros}{size - start} "
        f"bytes that belong to no member; {_COPY_AGAIN}. If it consists of several tars, unpack them with "
        "`tar --ignore-zeros -xf` and pack them as one"
    )


def _first_nonzero(file: BinaryIO, start: int) -> int | None:
    """Return the position of the first byte at or after `start` that is not zero, or None."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        rest = chunk.lstrip(b"\0")
        if rest:
            return start + len(chunk) - len(rest)
        start += len(chunk)
    return None


def _is_header(file: BinaryIO, start: int) -> bool:
    file.seek(start)
    try:
        tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
    except _MALFORMED:
        return False
    return True


def _resolve_links(members: list[TarMember]) -> list[TarMember]:
    """Replace links by the location of their targets, or by the reason why they cannot be resolved."""
    if not any(member.link for member in members):
        return members
    by_name: dict[str, TarMember] = {}
    for member in members:
        name = posixpath.normpath(member.name)
        twice = replace(member, link="", fault=f"is a link to {name}, which occurs twice in the tar")
        by_name[name] = twice if name in by_name else member
    return [_resolve_link(member, by_name) if member.link else member for member in members]


def _resolve_link(member: TarMember, by_name: dict[str, TarMember]) -> TarMember:
    target, visited = member, set()
    while target.link:
        if target.link in visited:
            return replace(member, link="", fault=f"is a link that leads back to itself through {target.link}")
        visited.add(target.link)
        if target.link not in by_name:
            return replace(member, link="", fault=f"is a link to {target.link}, which is not in the tar")
        target = by_name[target.link]
    return replace(target, name=member.name)
