"""Tars as other tools pack them, member by member."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from medalign.data.shards.index import ShardIndex
from medalign.data.shards.writer import PackReport, build_index
from tests.unit.data.tiny_data import picture, record

ANNOTATION = json.dumps({**record(1).fields, "boxes": []}).encode()
FILM = picture(7)


def file(name: str, data: bytes = b"", **header: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member; `header` gives further fields of its TarInfo."""
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
    """An image and its annotation as neighboring members."""
    return [file(f"{key}.{ending}", picture(seed)), file(f"{key}.json", ANNOTATION)]


def write(path: Path, *members: tuple[tarfile.TarInfo, bytes], **options: Any) -> Path:
    """Write a tar with these members in order. Returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path.parent


def indexed(folder: Path) -> tuple[PackReport, dict[str, int]]:
    """Index a folder. Returns the report, and the number of images of each sample when read."""
    report = build_index(folder)
    if not report.written:
        assert not (folder / "index.jsonl").exists()
        return report, {}
    index = ShardIndex.open(folder)
    return report, {index.key(i): len(index.read(i).images) for i in range(len(index))}
