"""Tars as other tools pack them, member by member."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from tiny_data import picture, record

from medalign.data.shards.index import ShardIndex
from medalign.data.shards.writer import PackReport, build_index

ANNOTATION = json.dumps({**record(1).fields, "boxes": []}).encode()
FILM = picture(7)


def file(name: str, data: bytes = b"", **header: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member; `header` are further fields of its TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in header.items():
        setattr(info, field, value)
    return info, data


def hard_link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return file(name, type=tarfile.LNKTYPE, linkname=target)


def symbolic_link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return file(name, type=tarfile.SYMTYPE, linkname=target)


def sample(key: str, ending: str = "png", seed: int = 7) -> list[tuple[tarfile.TarInfo, bytes]]:
    """An image and its annotation, side by side."""
    return [file(f"{key}.{ending}", picture(seed)), file(f"{key}.json", ANNOTATION)]


def write(path: Path, *members: tuple[tarfile.TarInfo, bytes], **options: Any) -> Path:
    """The tar of these members, in their order. Returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path.parent


def indexed(folder: Path) -> tuple[PackReport, dict[str, int]]:
    """The report of the folder's index, and how many images each sample of it has when it is read."""
    report = build_index(folder)
    if not report.written:
        assert not (folder / "index.jsonl").exists()
        return report, {}
    index = ShardIndex.open(folder)
    return report, {index.key(i): len(index.read(i).images) for i in range(len(index))}
