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
pixels. Memory and resume of a large index are measured by `tools.benchmarks.large_index`.
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
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Picture, Record
from medalign.data.shards.writer import write_shards
from medalign.geometry import resize, square_canvas
from tools.benchmarks import large_index

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


def main() -> None:
    """Measure all parts, print the result and write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=200, help="pictures of 512 pixels; a fifth of it of 2,500")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--index-samples", type=int, default=10_000_000)
    parser.add_argument("--output", type=Path, default=RESULT)
    chosen = parser.parse_args()
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
        "index": large_index.measure(chosen.index_samples, film(SIZE, 0)),
    }
    chosen.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
