"""The members of a tar and where their bytes stand, read from its headers; links lead to the bytes of their target.

Several archives one behind the other in one file, as `cat a.tar b.tar` makes them, are read as one. Whatever else
stands behind an end mark, or a tar that ends without one, is an error: it may have lost members in silence.
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

_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE  # bytes; tars are filled up with zeros to whole records
_CHUNK = 1 << 20  # bytes looked through at a time
_COPY_AGAIN = "copy it again or leave it out"
_MALFORMED = (tarfile.TarError, ValueError, OverflowError, LookupError)  # what tarfile raises for a broken header


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a tar."""

    name: str  # as in the tar, without a leading "./"
    offset: int  # bytes
    length: int  # bytes
    link: str = ""  # the name that it links to; "" for a file, and once the link was followed
    fault: str = ""  # why its bytes cannot be read, after "member NAME"


def scan(path: Path, notes: list[str]) -> list[Member]:
    """The files of a tar in their order, without folders.

    Args:
        notes: grows by what the user should know of this tar.

    Raises DataError for what is not a tar, and for a damaged one.
    """
    members: list[Member] = []
    start: int | None = 0
    with path.open("rb") as file:
        while start is not None:
            before = len(members)
            end = _read_archive(path, file, start, members)
            if start:
                notes.append(
                    f"{path.name}: another archive begins at byte {start}, behind an end mark; "
                    f"its {len(members) - before} files are read, too"
                )
            start = _next_archive(path, file, end)
    return _followed(members)


def _read_archive(path: Path, file: BinaryIO, start: int, members: list[Member]) -> int:
    """Append the members of the archive that begins at byte `start`; returns the byte where they end."""
    file.seek(start)
    try:
        with tarfile.TarFile(fileobj=file, encoding="utf-8") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                if info.size < 0:
                    raise tarfile.ReadError(f"{info.name} has {info.size} bytes")  # tarfile would run in a circle
                if not info.isdir():
                    members.append(_member(info))
            return tar.offset
    except _MALFORMED as error:
        raise DataError(_unreadable(path, members, error)) from error


def _member(info: tarfile.TarInfo) -> Member:
    name, link, fault = info.name.removeprefix("./"), "", ""
    if info.islnk():
        link = posixpath.normpath(info.linkname)
    elif info.issym():
        link = posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname))
    elif info.issparse():
        fault = "is a sparse file, whose bytes do not stand in one piece; pack it without --sparse"
    elif not info.isreg():
        kind = "a device" if info.ischr() or info.isblk() else "a FIFO" if info.isfifo() else f"of type {info.type!r}"
        fault = f"is {kind}, not a file"
    return Member(name, info.offset_data, info.size, link, fault)


def _unreadable(path: Path, members: Sequence[Member], error: Exception) -> str:
    """Why a tar cannot be read, and what to do."""
    packing = packing_of(path)
    if packing:
        return f"{path} is {packing}"
    if members:
        last, size = members[-1], path.stat().st_size
        if last.offset + last.length > size:
            return (
                f"{path} is cut: it has {size} bytes, and {last.name} ends at byte {last.offset + last.length}; "
                f"it is not a readable tar ({error}); {_COPY_AGAIN}"
            )
        return f"{path} is not a readable tar behind {last.name} ({error}); {_COPY_AGAIN}"
    return f"{path} is not a readable tar ({error}); {_COPY_AGAIN}"


def _next_archive(path: Path, file: BinaryIO, end: int) -> int | None:
    """The byte where another archive begins behind the one that ends at `end`, if any.

    Raises DataError for an end without a mark, and for anything but zeros or an archive behind it. Archives fill whole
    records, so a header elsewhere is what a lost piece left over.
    """
    size = file.seek(0, 2)
    if end >= size:
        raise DataError(
            f"{path} ends at byte {size} without the blocks of zeros that end a tar: it may be cut between two "
            f"members; {_COPY_AGAIN}, or, if it is whole, end it with `truncate -s +1024 {path.name}`"
        )
    start = _first_nonzero(file, end)
    if start is None:
        return None
    start -= start % _BLOCK
    if start > end and start % _RECORD == 0 and _is_header(file, start):
        return start
    found = f"{start - end} bytes of zeros and then " if start > end else ""
    raise DataError(
        f"{path} is damaged: where a member or the end should stand, at byte {end}, are {found}{size - start} bytes "
        f"that belong to no member; {_COPY_AGAIN}. If it is several tars in one, unpack them with "
        "`tar --ignore-zeros -xf` and pack them as one"
    )


def _first_nonzero(file: BinaryIO, start: int) -> int | None:
    """The first byte from `start` on that is not zero."""
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


def _followed(members: list[Member]) -> list[Member]:
    """Links with the place of the file that they lead to, or with why they lead to none."""
    if not any(member.link for member in members):
        return members
    by_name: dict[str, Member] = {}
    for member in members:
        name = posixpath.normpath(member.name)
        twice = replace(member, link="", fault=f"is a link to {name}, which the tar holds twice")
        by_name[name] = twice if name in by_name else member
    return [_follow(member, by_name) if member.link else member for member in members]


def _follow(member: Member, by_name: dict[str, Member]) -> Member:
    target, passed = member, set()
    while target.link:
        if target.link in passed:
            return replace(member, link="", fault=f"is a link that leads back to itself by {target.link}")
        passed.add(target.link)
        if target.link not in by_name:
            return replace(member, link="", fault=f"is a link to {target.link}, which the tar does not hold")
        target = by_name[target.link]
    return replace(target, name=member.name)
