"""Join shard folders into one without reading their samples."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from medalign.data.shards.index_file import IndexFile
from medalign.data.shards.listing import INDEX_NAME
from medalign.data.shards.output import replaced_folder, shard_name
from medalign.data.shards.writer import PackReport
from medalign.errors import DataError


def join_shards(parts: Sequence[Path], output: Path) -> PackReport:
    """Join several shard folders into one, with shards renumbered in the order of `parts`.

    The tars are hard links if the file system supports them, and copies otherwise. The parts are not changed.
    The output appears atomically, as in `write_shards`.

    Raises:
        DataError: no part contains a sample, `output` cannot be replaced, or the disk fails.
    """
    output = Path(output).absolute()
    with replaced_folder(output) as partial, IndexFile(partial) as index:
        for part in parts:
            _add_part(part, partial, index)
        if not index.shards:
            raise DataError(f"no valid sample for {output}")
    return PackReport(index.samples, len(index.shards), ())


def _add_part(part: Path, output: Path, index: IndexFile) -> None:
    """Link the shards of a part under the next free names, and add their rows."""
    with (part / INDEX_NAME).open(encoding="utf-8") as lines:
        for shard in json.loads(next(lines))["shards"]:
            index_of_shard = len(index.shards)
            path = output / shard_name(index_of_shard)
            _link(part / shard["name"], path)
            rows = ({**json.loads(row), "shard": index_of_shard} for row in islice(lines, shard["samples"]))
            index.add(path, rows)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # hard links are not supported
        shutil.copyfile(source, target)
