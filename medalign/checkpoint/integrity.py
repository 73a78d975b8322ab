"""The completion marker of a checkpoint: the size and the SHA-256 of each of its files.

The marker is written last, so a checkpoint that has it is complete. It is checked before anything is loaded. The ranks
share the reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medalign import distributed
from medalign.checkpoint.files import write_flushed
from medalign.errors import CheckpointError
from medalign.run_folder import CheckpointFolder

_DIGEST_BYTES = hashlib.sha256().digest_size


def digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files in a checkpoint, by name."""
    return {str(path.relative_to(folder)): _digest(path).hex() for path in files}


def seal(folder: Path, known: Mapping[str, str]) -> None:
    """Write the marker of a checkpoint whose files are all written. Every rank must call it.

    Args:
        folder: the checkpoint.
        known: the SHA-256 of the files that this rank has written, by name. The ranks share the reading of all others.

    Raises:
        MedAlignError: a rank cannot read a file, rank 0 does not see the file of another rank, or it cannot write the
            marker; on every rank.
    """
    found: dict[str, str] = {}
    for text in distributed.gather_texts(json.dumps(dict(known))):
        found |= json.loads(text)
    listing = ""
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            listing = json.dumps(_sizes(folder, found))
    sizes: dict[str, int] = json.loads(distributed.broadcast_from_main(listing))
    found |= _shared_digests(folder, _by_size({name: size for name, size in sizes.items() if name not in found}))
    files = {name: {"bytes": size, "sha256": found[name]} for name, size in sizes.items()}
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            write_flushed(CheckpointFolder(folder).marker, json.dumps({"files": files}, indent=1) + "\n")


def _shared_digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of files by name; each rank reads its share. Every rank must call it with the same names."""
    rows = torch.zeros(len(names), _DIGEST_BYTES, dtype=torch.float64, device=distributed.device())
    with distributed.raise_on_all_ranks():
        for index in _own_share(len(names)):
            rows[index] = torch.tensor(list(_digest(folder / names[index])), dtype=torch.float64)
    summed = distributed.sum_over_ranks({"digests": rows})["digests"].to(torch.uint8).cpu().tolist()
    return {name: bytes(row).hex() for name, row in zip(names, summed, strict=True)}


def verify(folder: Path) -> None:
    """Check each file of a checkpoint against its marker. Every rank must call it.

    Raises:
        MedAlignError: the marker or a file is missing, damaged or cannot be read; on every rank. The message names the
            file.
    """
    marker = ""
    with distributed.raise_on_all_ranks():
        if distributed.is_main():
            marker = json.dumps(_read_marker(folder))
    files: dict[str, dict[str, Any]] = json.loads(distributed.broadcast_from_main(marker))
    names = _by_size({name: entry["bytes"] for name, entry in files.items()})
    with distributed.raise_on_all_ranks():
        for index in _own_share(len(names)):
            _require_digest(folder, names[index], files[names[index]])


def verify_export(export: Path) -> None:
    """Check the files of an export inside a checkpoint against its marker. An export of its own has none.

    Raises:
        CheckpointError: a file is missing or damaged; the message names it.
    """
    checkpoint = CheckpointFolder(export.parent)
    if export != checkpoint.export or not checkpoint.marker.is_file():
        return
    try:
        for name, entry in _read_marker(checkpoint.path, f"{export.name}/").items():
            _require_digest(checkpoint.path, name, entry)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.path}: {error}; give another checkpoint, or restore this one from a copy"
        ) from error


def _require_digest(folder: Path, name: str, entry: dict[str, Any]) -> None:
    if _digest(folder / name) != bytes.fromhex(entry["sha256"]):
        raise CheckpointError(f"{name} is damaged: its content does not match its SHA-256")


def _read_marker(folder: Path, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Return the entries of the marker for names with `prefix`, after a check of the size of each file."""
    path = CheckpointFolder(folder).marker
    if not path.is_file():
        raise CheckpointError(
            f"{path.name} is missing: the checkpoint is not complete, or an earlier version of medalign wrote it"
        )
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        files = {name: entry for name, entry in files.items() if name.startswith(prefix)}
        expected = {name: (int(entry["bytes"]), len(bytes.fromhex(entry["sha256"]))) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name} is damaged ({type(error).__name__}: {error})") from error
    for name, (size, _) in expected.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{name} is damaged: it has {file.stat().st_size} bytes instead of {size}")
    return dict(files)


def _sizes(folder: Path, written: Iterable[str]) -> dict[str, int]:
    """Return the size of each file in a checkpoint.

    Raises:
        CheckpointError: a file that a rank has written is not there.
    """
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    if missing := sorted(set(written) - sizes.keys()):
        raise CheckpointError(
            f"rank 0 does not see {folder / missing[0]}, which another rank has written; run.dir must be on a file "
            "system that all nodes share"
        )
    return sizes


def _by_size(sizes: dict[str, int]) -> list[str]:
    """Return the names in descending order of size, so that dealing them out in turn gives equal shares."""
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def _own_share(count: int) -> Sequence[int]:
    return range(distributed.rank(), count, distributed.world_size())


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
