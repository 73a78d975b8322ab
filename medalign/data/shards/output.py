"""The folder that shards are written to: it appears atomically and replaces shards only."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medalign.data.shards.listing import INDEX_NAME
from medalign.data.shards.mapped_table import TABLE_NAME
from medalign.errors import DataError

_SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")
_OURS = (INDEX_NAME, TABLE_NAME)


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:06d}.tar"


@contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `output`, which becomes `output` if the block ends without an error.

    Args:
        output: an absolute path. An existing folder of shards is replaced.

    Raises:
        DataError: `output` cannot be replaced, or the disk fails.
    """
    require_replaceable(output)
    # Numbers of processes repeat, in containers from one start to the next: a killed one may have left such a folder.
    partial = output.parent / f".{output.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        yield partial
        _move_into_place(partial, output)
    except OSError as error:
        raise DataError(f"packing into {output} failed, nothing was written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_replaceable(output: Path) -> None:
    """Check that shards can be written to `output`: it does not exist, or contains only shards.

    Raises:
        DataError: `output` is a file, or a folder that contains anything else.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise DataError(f"{output} is a file; name a folder for the shards")
    foreign = [p.name for p in sorted(output.iterdir()) if p.name not in _OURS and not _SHARD_NAME.fullmatch(p.name)]
    if foreign:
        raise DataError(f"{output} contains {foreign[0]!r}, which is not a shard; name an empty or a new folder")


def _move_into_place(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = output.parent / f".{output.name}.old-{os.getpid()}-{secrets.token_hex(4)}"
    output.rename(old)
    partial.rename(output)
    shutil.rmtree(old)
