"""The memory and the start of a run on a large index: a synthetic one, with all rows pointing into one real shard.

`tools.benchmarks.data` calls it. As a program (`python -m tools.benchmarks.large_index FOLDER POSITION`), it measures a
new process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from medalign.data.order.order import GlobalOrder
from medalign.data.shards import listing, mapped_table, table_reader
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Picture, Record
from medalign.data.shards.writer import write_shards

ROOT = Path(__file__).resolve().parents[2]


def synthetic(folder: Path, samples: int, picture: bytes) -> None:
    """Write an index of `samples` samples in 1,000 shards that are all links to one shard with one sample."""
    fields = {"task": "vqa", "question": "is there a nodule?", "answer": "no"}
    write_shards([Record("real", (Picture(picture, "jpg"),), fields)], folder / "one")
    real = table_reader.read_table(folder / "one")
    each = samples // 1000
    entries = []
    for number in range(1000):
        os.link(folder / "one" / "shard-000000.tar", folder / f"shard-{number:06d}.tar")
        entries.append([f"shard-{number:06d}.tar", real.shards[0].size, each])
    text = folder / listing.INDEX_NAME
    header = {"format": listing.FORMAT, "version": listing.VERSION, "samples": each * 1000}
    header["shards"] = [{"name": name, "bytes": size, "samples": count} for name, size, count in entries]
    text.write_text(json.dumps(header) + "\n")  # the rows are written in their mapped form only
    rows = np.repeat(real.rows, each * 1000)
    rows["shard"] = np.arange(each * 1000) // each
    keys = b"".join(b"sample-%010d" % i for i in range(each * 1000))
    with (folder / mapped_table.TABLE_NAME).open("wb") as file:
        rows.tofile(file)
        file.write(b"\0" * (mapped_table._ends_at(len(rows)) - file.tell()))
        (np.arange(1, len(rows) + 1, dtype=np.int64) * 17).tofile(file)
        file.write(keys)
        file.write(b"\0" * (mapped_table._further_at(len(rows), len(keys)) - file.tell()))  # and no further images
        packed = listing.IndexStats(keys=len(keys), further=0, max_images=1)
        footer = {"samples": len(rows), **packed._asdict(), "stamp": table_reader._stamp(text), "shards": entries}
        body = json.dumps(footer).encode()
        file.write(body + len(body).to_bytes(8, "little") + mapped_table._MAGIC)


def first_batch(folder: Path, position: int) -> None:
    """Print the time from opening the index to a decoded batch at a position, and the memory of this new process."""
    began = time.perf_counter()
    index = ShardIndex.open(folder)
    order = GlobalOrder(len(index), 0, shards=index.shard_sizes(0))
    read = [index.read(int(number), at_least=336) for number in order.take(position, 32)]
    seconds = time.perf_counter() - began
    assert len({sample.key for sample in read}) == 32
    epoch = order.take(0, len(index)) if position == 10 else None  # touches every block of the order
    touched = int(sum(int(table_.rows["checksum"].sum()) for table_ in index._tables))  # and every page of the rows
    assert touched and (epoch is None or len(epoch) == len(index))
    status = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    print(json.dumps({"position": position, "seconds": round(seconds, 3), "own_mib": round(own / 1024)}))


def measure(samples: int, picture: bytes) -> dict[str, object]:
    """Measure the time to a batch and the memory of a new process, on an index of `samples` samples.

    Args:
        samples: number of rows; a multiple of 1,000, at least 100,000 (smaller indexes are not mapped).
        picture: the JPEG that every row points to.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic(folder, samples, picture)
        shared = (folder / mapped_table.TABLE_NAME).stat().st_size
        found = []
        for position in (10, 1_000_000 if samples > 1_000_100 else samples // 2) * 2:
            command = [sys.executable, "-m", "tools.benchmarks.large_index", str(folder), str(position)]
            answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: S603
            found.append(json.loads(answer))
    return {"samples": samples, "mapped_mib_shared_by_a_node": round(shared / 2**20), "first_batch": found}


if __name__ == "__main__":
    first_batch(Path(sys.argv[1]), int(sys.argv[2]))
