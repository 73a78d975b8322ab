"""Shards over the network: ranges, read-ahead, retries, and a cache that stays within its bound."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import pickle
import re
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import fsspec
import pytest
from test_loader import assert_same, collator, loader
from tiny_data import images, picture, record

from medalign.data.cache import RangeCache
from medalign.data.index import ShardIndex
from medalign.data.loader import TrainLoader
from medalign.data.plan import GlobalOrder
from medalign.data.records import Record
from medalign.data.shards import write_shards
from medalign.data.storage import Access
from medalign.errors import ConfigError, DataError

QUICK = Access(retries=4, pause=0.01)


class Server(ThreadingHTTPServer):
    """Serves a folder with byte ranges; of the requests for tars every second fails, `troubles` in all, four ways."""

    daemon_threads = True
    troubles = 0
    asked = 0
    ranges = True

    def __init__(self, folder: Path) -> None:
        self.log: list[tuple[str, str | None]] = []  # path and range of each answered request
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))

    @property
    def tars(self) -> int:
        """Answered requests for tars."""
        return len([name for name, _ in self.log if name.endswith(".tar")])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        self.server.log.append((path.name, wanted))
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if match and self.server.ranges:
            data = data[int(match[1]) : int(match[2]) + 1]
        trouble = None
        self.server.asked += path.suffix == ".tar"
        if path.suffix == ".tar" and self.server.troubles and self.server.asked % 2:
            trouble = self.server.troubles % 4
            self.server.troubles -= 1
        if trouble == 0:
            return self.send_error(503)
        if trouble == 1:
            return self.connection.close()  # before a single byte
        self.send_response(206 if match and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(data) if trouble != 3 else len(data) // 2))
        self.end_headers()
        self.wfile.write(data if trouble is None else data[: len(data) // 2])  # 2: dropped in the middle; 3: short
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with Server(shards.parent) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def same_samples(one: ShardIndex, two: ShardIndex) -> None:
    assert one.keys == two.keys
    for i in range(len(one)):
        a, b = one.read(i), two.read(i)
        assert (a.question, a.answer, a.boxes) == (b.question, b.answer, b.boxes)
        assert [image.tobytes() for image in a.images] == [image.tobytes() for image in b.images]


@pytest.mark.parametrize("ranges", [True, False])
def test_http_gives_the_same_samples(shards: Path, server: Server, ranges: bool) -> None:
    server.ranges = ranges
    remote = ShardIndex.open(f"{server.address}/train", QUICK)
    same_samples(remote, ShardIndex.open(shards))
    tars = [wanted for name, wanted in server.log if name.endswith(".tar")]
    assert len(tars) == 23  # one request a sample: image and annotation lie side by side
    assert all(tars)


def test_all_images_of_a_sample_come_in_one_request(shards: Path, server: Server) -> None:
    fields = record(0, boxes=[]).fields
    several = [Record(f"k{n}", images(*(picture(seed) for seed in range(n))), fields) for n in (3, 0, 12)]
    write_shards(several, shards.parent / "several")
    remote = ShardIndex.open(f"{server.address}/several", QUICK)
    remote.ahead([0, 1, 2])
    same_samples(remote, ShardIndex.open(shards.parent / "several"))
    assert [len(remote.read(i).images) for i in range(3)] == [3, 0, 12]
    assert len([name for name, _ in server.log if name.endswith(".tar")]) == 6  # three samples, ahead and again


def test_dropped_connections_are_tried_again(shards: Path, server: Server) -> None:
    remote = ShardIndex.open(f"{server.address}/train", QUICK)
    server.troubles = 16
    same_samples(remote, ShardIndex.open(shards))
    assert server.troubles == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_bad_network_are_those_from_the_disk(shards: Path, server: Server, workers: int) -> None:
    remote = ShardIndex.open(f"{server.address}/train", Access(retries=8, pause=0.01))
    server.troubles = 8  # even if all of them hit one read, its last try succeeds
    far = TrainLoader(remote, GlobalOrder(23, 3), collator(), global_batch=6, micro_batch=3, workers=workers)
    for one, two in islice(zip(loader(shards), far, strict=False), 5):
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)


def test_a_lost_shard_is_retried_then_named(shards: Path, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    remote = ShardIndex.open(f"{server.address}/train", Access(retries=2, pause=0.01))
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train/shard-000002\.tar cannot be read after 3 tries"):
        remote.read(15)
    assert "trying 2 more times" in caplog.text
    with pytest.raises(DataError, match="nowhere/index.jsonl"):
        ShardIndex.open(f"{server.address}/nowhere", Access(retries=0))


def test_a_shard_that_comes_back_in_time_is_read(shards: Path) -> None:
    index = ShardIndex.open(shards, Access(retries=6, pause=0.05))
    tar, away = shards / "shard-000000.tar", shards / "away"
    tar.rename(away)
    threading.Timer(0.3, lambda: away.rename(tar)).start()
    assert index.read(1).key == "s001"


def test_read_ahead_begins_before_it_is_asked_for(server: Server) -> None:
    remote = ShardIndex.open(f"{server.address}/train", QUICK)
    remote.ahead([1, 2, 3])
    deadline = time.monotonic() + 30
    while server.tars < 3:
        assert time.monotonic() < deadline, "nothing was asked for before it was read"
        time.sleep(0.005)
    assert [remote.read(i).key for i in (1, 2, 3)] == ["s001", "s002", "s003"]
    assert server.tars == 3  # what came ahead is not fetched again
    assert pickle.loads(pickle.dumps(remote)).read(4).key == "s004"  # noqa: S301  # bytes made on this line


def test_the_next_micro_batch_is_read_ahead(server: Server) -> None:
    """What the same worker reads next is under way before the batch at hand is given out."""
    remote = ShardIndex.open(f"{server.address}/train", QUICK)
    far = TrainLoader(remote, GlobalOrder(23, 3), collator(), global_batch=6, micro_batch=3)
    next(iter(far))
    deadline = time.monotonic() + 30
    while server.tars < 9:  # two micro-batches, and the one after them
        assert time.monotonic() < deadline, f"{server.tars} requests"
        time.sleep(0.005)
    assert server.tars == 9


class _Lasting(_Handler):
    protocol_version = "HTTP/1.1"  # connections outlive their request


def _read_in_a_child(remote: ShardIndex) -> None:
    assert remote.read(2).key == "s002"
    gc.collect()


@pytest.mark.timeout(60)  # a parent whose connection was closed by its child waits for five minutes
def test_a_forked_reader_leaves_its_parents_connections_alone(shards: Path, server: Server) -> None:
    server.RequestHandlerClass = functools.partial(_Lasting, directory=str(shards.parent))
    remote = ShardIndex.open(f"{server.address}/train", QUICK)
    assert remote.read(1).key == "s001"
    child = multiprocessing.get_context("fork").Process(target=_read_in_a_child, args=(remote,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert remote.read(3).key == "s003"


def test_the_cache_serves_a_second_epoch_within_its_bound(shards: Path, server: Server, tmp_path: Path) -> None:
    bound = 12_000
    remote = ShardIndex.open(f"{server.address}/train", Access(pause=0.01, cache=tmp_path / "c", cache_bytes=bound))
    for _ in range(2):
        for i in range(6):
            remote.read(i)
    kept = [path.stat().st_size for path in (tmp_path / "c" / "ranges").glob("*.range")]
    assert 0 < sum(kept) <= bound
    assert len([name for name, _ in server.log if name.endswith(".tar")]) == 6
    for i in range(len(remote)):
        remote.read(i)
        assert sum(p.stat().st_size for p in (tmp_path / "c" / "ranges").glob("*.range")) <= bound


def test_the_cache_lets_the_oldest_go(tmp_path: Path) -> None:
    import os

    cache = RangeCache(tmp_path, 100)
    for number, name in enumerate("abcd"):
        cache.put(name, name.encode() * 25)
        os.utime(cache._path(name), ns=(number, number))
    assert cache.get("a") == b"a" * 25  # now the most recently used
    cache.put("e", b"e" * 30)
    assert [cache.get(name) is not None for name in "abcde"] == [True, False, False, True, True]
    cache.put("f", b"f" * 101)
    assert cache.get("f") is None


def test_any_fsspec_address(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/train/{path.name}", path.read_bytes())
    same_samples(ShardIndex.open("memory://train", QUICK), ShardIndex.open(shards))
    with pytest.raises(ConfigError, match=r"pipe:.*not read through a shell"):
        ShardIndex.open("pipe:cat shard.tar")
    with pytest.raises(ConfigError, match=r"xyz://a.*medalign\[remote\]"):
        ShardIndex.open("xyz://a")
