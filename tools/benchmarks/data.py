"""Measures the cost of reading data: the index of medalign compared with common pipelines, on one core.

    python -m tools.benchmarks.data                        # all parts; tools/benchmarks/results/data_cpu.json
    python -m tools.benchmarks.data --samples 400 --rounds 5
    python -m tools.benchmarks.data --index-samples 1000000

Speed: gray JPEGs of 512 x 512 and 2,500 x 2,500 pixels, with little and with much noise, are stored in a webdataset tar
and as files, then read and resized to 336 x 336 pixels. The readers take turns, so that other load on the machine
affects all of them:

    medalign     byte ranges from the index, checksum, gray decoding, at reduced scale for much larger films,
                 resized as for the towers
    webdataset   WebDataset(...).decode("pilrgb"), resized
    files        torch's Dataset of files through its DataLoader (no workers), opened and converted to RGB, resized
    litdata      StreamingDataset over its own chunks of the same JPEG bytes, opened and converted to RGB, resized;
                 only if it is installed (pip install litdata); the result states if it is not

At 512 pixels the results must be bit-identical, otherwise the run stops. At 2,500 pixels the largest and the mean
difference in gray levels are recorded. `at_most` is an upper bound for any reader of these bytes with this decoder: the
ratio if medalign took only as long as decoding at an eighth of the scale, which reads every code and computes almost no
pixels. Memory and resume are measured on a synthetic index. All of its rows point into one real shard.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from medalign.data.order.order import GlobalOrder
from medalign.data.shards import listing, mapped_table, table_reader
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Picture, Record
from medalign.data.shards.writer import write_shards
from medalign.geometry import resize, square_canvas

SIZE = 336
HAS_LITDATA = importlib.util.find_spec("litdata") is not None
ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "tools/benchmarks/results/data_cpu.json"


def film(side: int, seed: int, noise: int = 2) -> bytes:
    """Return a gray JPEG with smooth structure and noise of `noise` gray levels; more noise gives more bytes."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (24, 24), dtype=np.uint8))
    soft = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = (soft + draw.integers(-noise, noise + 1, (side, side))).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def ours(folder: Path) -> Iterator[np.ndarray]:
    """Read with medalign; arrays [336, 336, 1], because the towers' views expand the one channel of gray pictures."""
    index = ShardIndex.open(folder / "shards")
    for position in GlobalOrder(len(index), 0, shuffle=False).epoch(0):
        canvas = square_canvas(index.read(int(position), at_least=SIZE).images[0])
        yield resize(canvas, SIZE)[..., None]


def shrink(image: Image.Image) -> np.ndarray:
    """Resize a picture to [336, 336, 3]."""
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def plain_webdataset(folder: Path) -> Iterator[np.ndarray]:
    """Read the tar files with webdataset; arrays [336, 336, 3]."""
    urls = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgb"):
        yield shrink(sample["jpg"])


class Files(Dataset):
    """The pictures as single files; arrays [336, 336, 3]."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted((folder / "files").glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray:
        return shrink(Image.open(self.paths[i], formats=("JPEG",)).convert("RGB"))


def files(folder: Path) -> Iterator[np.ndarray]:
    """Read the single files with torch's DataLoader."""
    yield from DataLoader(Files(folder), batch_size=None, collate_fn=lambda x: x)


def write_chunks(records: list[Record], folder: Path) -> None:
    """Write the pictures as litdata chunks of JPEG bytes, because litdata decodes its own picture types differently."""
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes="64MB")
    for i, record in enumerate(records):
        cache[i] = {"jpg": record.images[0].data, **record.fields}
    cache.done()
    cache.merge()


def chunks(folder: Path) -> Iterator[np.ndarray]:
    """Read the chunks with litdata; arrays [336, 336, 3]."""
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # it may look for a newer version online
    from litdata import StreamingDataset

    for sample in StreamingDataset(str(folder / "chunks"), shuffle=False):
        yield shrink(Image.open(io.BytesIO(sample["jpg"]), formats=("JPEG",)).convert("RGB"))


WAYS: dict[str, Callable[[Path], Iterator[np.ndarray]]] = {
    "medalign": ours,
    "webdataset": plain_webdataset,
    "files": files,
} | ({"litdata": chunks} if HAS_LITDATA else {})


def speed(side: int, noise: int, samples: int, rounds: int) -> dict[str, object]:
    """Measure all readers on pictures of one size, in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        fields = {"task": "vqa", "question": "is there a nodule?", "answer": "no"}
        records = [Record(f"k{i:05d}", (Picture(film(side, i, noise), "jpg"),), fields) for i in range(samples)]
        write_shards(records, folder / "shards", samples_per_shard=100)
        for record in records:
            (folder / "files" / f"{record.key}.jpg").write_bytes(record.images[0].data)
        if HAS_LITDATA:
            write_chunks(records, folder / "chunks")
        equal = compare(folder, side)
        ways = {**WAYS, "codes": lambda _: map(read_codes, records)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds + 1):  # the first round warms the disk cache and is discarded
            for way, read in ways.items():
                began = time.process_time()
                assert sum(1 for _ in read(folder)) == samples
                seconds[way].append(time.process_time() - began)
    return {
        "side": side,
        "noise": noise,
        "bytes_per_pixel": round(sum(len(r.images[0].data) for r in records) / samples / side**2, 3),
        "samples": samples,
        "rounds": rounds,
        **times(seconds),
        **equal,
    }


def read_codes(record: Record) -> Image.Image:
    """Decode a picture at an eighth of the scale: all Huffman codes are read, but one value in 64 becomes a pixel."""
    image = Image.open(io.BytesIO(record.images[0].data), formats=("JPEG",))
    image.draft(None, (image.width // 8, image.height // 8))
    image.load()
    return image


def times(seconds: dict[str, list[float]]) -> dict[str, object]:
    """Return ratios to medalign: of the medians, the extremes over single rounds, and the upper bound."""
    measured = {way: np.array(rounds[1:]) for way, rounds in seconds.items()}
    median = {way: float(np.median(rounds)) for way, rounds in measured.items()}
    others = [way for way in WAYS if way != "medalign"]
    ratios = {way: measured[way] / measured["medalign"] for way in others}
    return {
        "times_faster_than": {way: round(median[way] / median["medalign"], 2) for way in others},
        "in_single_rounds": {way: [round(float(r.min()), 2), round(float(r.max()), 2)] for way, r in ratios.items()},
        "at_most": {way: round(median[way] / median["codes"], 2) for way in others},
    }


def compare(folder: Path, side: int) -> dict[str, object]:
    """Require the same pixels from all readers; where medalign decodes at reduced scale, measure the difference."""
    apart, largest, count = 0.0, 0, 0
    for mine, theirs, *others in zip(*(read(folder) for read in WAYS.values()), strict=True):
        if theirs.shape != (SIZE, SIZE, 3) or not all(np.array_equal(theirs, other) for other in others):
            raise SystemExit(f"{', '.join(list(WAYS)[1:])} differ, so the comparison would be unfair")
        difference = np.abs(mine.astype(int) - theirs)
        apart, largest, count = apart + difference.mean(), max(largest, int(difference.max())), count + 1
    if side < 2 * SIZE and largest:
        raise SystemExit(f"the pixels differ by up to {largest} at {side} pixels, where they must be equal")
    return {"pixel_equal": largest == 0, "mean_difference": round(apart / count, 3), "largest_difference": largest}


def synthetic(folder: Path, samples: int) -> None:
    """Write an index of `samples` samples in 1,000 shards that are all links to one shard with one sample."""
    fields = {"task": "vqa", "question": "is there a nodule?", "answer": "no"}
    write_shards([Record("real", (Picture(film(336, 0), "jpg"),), fields)], folder / "one")
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
    read = [index.read(int(number), at_least=SIZE) for number in order.take(position, 32)]
    seconds = time.perf_counter() - began
    assert len({sample.key for sample in read}) == 32
    epoch = order.take(0, len(index)) if position == 10 else None  # touches every block of the order
    touched = int(sum(int(table_.rows["checksum"].sum()) for table_ in index._tables))  # and every page of the rows
    assert touched and (epoch is None or len(epoch) == len(index))
    status = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    print(json.dumps({"position": position, "seconds": round(seconds, 3), "own_mib": round(own / 1024)}))


def large_index(samples: int) -> dict[str, object]:
    """Measure the time to a batch and the memory of a new process on an index of `samples` samples."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic(folder, samples)
        shared = (folder / mapped_table.TABLE_NAME).stat().st_size
        found = []
        for position in (10, 1_000_000 if samples > 1_000_100 else samples // 2) * 2:
            command = [sys.executable, "-m", "tools.benchmarks.data", "--first-batch", str(folder), str(position)]
            answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: S603
            found.append(json.loads(answer))
    return {"samples": samples, "mapped_mib_shared_by_a_node": round(shared / 2**20), "first_batch": found}


def main() -> None:
    """Measure all parts, print the result and write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=200, help="pictures of 512 pixels; a fifth of it of 2,500")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--index-samples", type=int, default=10_000_000)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--first-batch", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.first_batch:
        return first_batch(Path(chosen.first_batch[0]), int(chosen.first_batch[1]))
    torch.set_num_threads(1)
    if not HAS_LITDATA:
        print("litdata is not installed, so it is not measured; pip install litdata", file=sys.stderr)
    result = {
        "command": shlex.join(["python", "-m", "tools.benchmarks.data", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, one core, CPU time of the process",
        "versions": {"pillow": Image.__version__, "webdataset": webdataset.__version__, "torch": torch.__version__},
        "litdata": importlib.metadata.version("litdata") if HAS_LITDATA else "not installed, not measured",
        "speed": [
            speed(side, noise, max(chosen.samples * 512 // side, 5), chosen.rounds)
            for side in (512, 2500)
            for noise in (2, 6)
        ],
        "index": large_index(chosen.index_samples),
    }
    chosen.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return None


if __name__ == "__main__":
    main()
