"""Shards over the network: ranges, read-ahead, retries, and a cache that stays within its bound."""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import fsspec
import pytest

from medalign.data.batches.loader import TrainLoader
from medalign.data.order.order import GlobalOrder
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Record
from medalign.data.shards.writer import write_shards
from medalign.data.storage import byte_ranges, fetched_folder
from medalign.data.storage.byte_ranges import StorageOptions
from medalign.data.storage.cache import RangeCache, file_lock
from medalign.errors import ConfigError, DataError
from tests.unit.data.batches.test_loader import assert_same, collator, loader
from tests.unit.data.tiny_data import images, picture, record

QUICK = StorageOptions(retries=4, pause=0.01)


class Server(ThreadingHTTPServer):
    """Serves a folder with byte ranges. Every second request for a tar fails, `troubles` in total, in four ways."""

    daemon_threads = True
    troubles = 0
    asked = 0
    ranges = True
    lengths = True  # whether it reports the length of a file

    def __init__(self, folder: Path) -> None:
        self.log: list[tuple[str, str | None]] = []  # path and range of each answered request
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))

    @property
    def tars(self) -> int:
        """Number of answered requests for tars."""
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
            return self.connection.close()  # before the first byte
        self.send_response(206 if match and self.server.ranges else 200)
        if self.server.lengths:
            self.send_header("Content-Length", str(len(data) if trouble != 3 else len(data) // 2))
        self.end_headers()
        self.wfile.write(data if trouble is None else data[: len(data) // 2])  # 2: dropped in the middle; 3: short
        return None

    def do_HEAD(self) -> None:
        if self.server.lengths:
            return super().do_HEAD()
        self.send_response(200)
        return self.end_headers()

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


def rename_last(folder: Path) -> None:
    """Rewrite the index with another last key of the same length, so that its size does not change."""
    path = folder / "index.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    renamed = rest.replace(b"s022", b"t022")
    checksum = {"checksum": f"{zlib.crc32(renamed):08x}"} if b"checksum" in first else {}
    path.write_bytes(json.dumps(json.loads(first) | checksum, separators=(",", ":")).encode() + b"\n" + renamed)


@pytest.mark.parametrize("ranges", [True, False])
def test_http_gives_the_same_samples(shards: Path, server: Server, ranges: bool) -> None:
    server.ranges = ranges
    remote = ShardIndex.open(f"{server.address}/train", QUICK)
    same_samples(remote, ShardIndex.open(shards))
    tars = [wanted for name, wanted in server.log if name.endswith(".tar")]
    assert len(tars) == 23  # one request per sample: image and annotation are neighbors
    assert all(tars)


def test_all_images_of_a_sample_come_in_one_request(shards: Path, server: Server) -> None:
    fields = record(0, boxes=[]).fields
    several = [Record(f"k{n}", images(*(picture(seed) for seed in range(n))), fields) for n in (3, 0, 12)]
    write_shards(several, shards.parent / "several")
    remote = ShardIndex.open(f"{server.address}/several", QUICK)
    remote.prefetch([0, 1, 2])
    same_samples(remote, ShardIndex.open(shards.parent / "several"))
    assert [len(remote.read(i).images) for i in range(3)] == [3, 0, 12]
    assert (
        len([name for name, _ in server.log if name.endswith(".tar")]) == 6
    )  # three samples, prefetched and read again


def test_an_index_is_fetched_again_only_if_it_changed(shards: Path, server: Server) -> None:
    def asked() -> list[str | None]:
        found = [wanted for name, wanted in server.log if name == "index.jsonl"]
        server.log.clear()
        return found

    size = (shards / "index.jsonl").stat().st_size
    beginning = f"bytes=0-{size - 1}"  # the file is shorter than the part that is compared
    first = ShardIndex.open(f"{server.address}/train", QUICK)
    assert asked() == [None]
    assert ShardIndex.open(f"{server.address}/train", QUICK).keys == first.keys
    assert asked() == [beginning]
    rename_last(shards)
    assert (shards / "index.jsonl").stat().st_size == size
    assert ShardIndex.open(f"{server.address}/train", QUICK).keys == [*first.keys[:-1], "t022"]
    assert asked() == [beginning, None]


def test_only_the_beginning_of_a_long_index_is_compared(
    shards: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched_folder, "_BEGINNING", 100)
    ShardIndex.open(f"{server.address}/train", QUICK)
    rename_last(shards)
    assert ShardIndex.open(f"{server.address}/train", QUICK).keys[-1] == "t022"  # by the checksum in the header
    asked = [wanted for name, wanted in server.log if name == "index.jsonl"]
    assert asked == [None, "bytes=0-99", None]


def test_an_index_without_checksum_is_fetched_by_its_size(
    shards: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched_folder, "_BEGINNING", 100)
    path = shards / "index.jsonl"
    path.write_bytes(re.sub(rb'"checksum":"[0-9a-f]{8}",', b"", path.read_bytes()))
    old = ShardIndex.open(f"{server.address}/train", QUICK)
    same_samples(old, ShardIndex.open(shards))
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DataError, match="line 25 is damaged"):
        ShardIndex.open(f"{server.address}/train", QUICK)


def test_dropped_connections_are_retried(shards: Path, server: Server) -> None:
    remote = ShardIndex.open(f"{server.address}/train", QUICK)
    server.troubles = 16
    same_samples(remote, ShardIndex.open(shards))
    assert server.troubles == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_an_unreliable_network_equal_those_from_disk(shards: Path, server: Server, workers: int) -> None:
    remote = ShardIndex.open(f"{server.address}/train", StorageOptions(retries=8, pause=0.01))
    server.troubles = 8  # even if all of them affect one read, its last attempt succeeds
    far = TrainLoader(remote, GlobalOrder(23, 3), collator(), global_batch=6, micro_batch=3, workers=workers)
    for one, two in islice(zip(loader(shards), far, strict=False), 5):
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)


def test_a_lost_shard_is_retried_then_named(shards: Path, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    remote = ShardIndex.open(f"{server.address}/train", StorageOptions(retries=2, pause=0.01))
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train/shard-000002\.tar cannot be read after 3 tries"):
        remote.read(15)
    assert "retrying up to 2 times" in caplog.text
    with pytest.raises(DataError, match="nowhere/index.jsonl"):
        ShardIndex.open(f"{server.address}/nowhere", StorageOptions(retries=0))


def test_a_shard_that_comes_back_in_time_is_read(shards: Path) -> None:
    index = ShardIndex.open(shards, StorageOptions(retries=6, pause=0.05))
    tar, away = shards / "shard-000000.tar", shards / "away"
    tar.rename(away)
    threading.Timer(0.3, lambda: away.rename(tar)).start()
    assert index.read(1).key == "s001"


def test_prefetching_starts_before_the_read(server: Server) -> None:
    remote = ShardIndex.open(f"{server.address}/train", QUICK)
    remote.prefetch([1, 2, 3])
    deadline = time.monotonic() + 30
    while server.tars < 3:
        assert time.monotonic() < deadline, "nothing was asked for before it was read"
        time.sleep(0.005)
    assert [remote.read(i).key for i in (1, 2, 3)] == ["s001", "s002", "s003"]
    assert server.tars == 3  # prefetched ranges are not fetched again
    assert pickle.loads(pickle.dumps(remote)).read(4).key == "s004"  # noqa: S301  # bytes made on this line


def test_the_next_micro_batch_is_prefetched(server: Server) -> None:
    """The next micro-batch of a worker is prefetched before the current batch is returned."""
    remote = ShardIndex.open(f"{server.address}/train", QUICK)
    far = TrainLoader(remote, GlobalOrder(23, 3), collator(), global_batch=6, micro_batch=3)
    next(iter(far))
    deadline = time.monotonic() + 30
    while server.tars < 9:  # two micro-batches and the next one
        assert time.monotonic() < deadline, f"{server.tars} requests"
        time.sleep(0.005)
    assert server.tars == 9


class _Lasting(_Handler):
    protocol_version = "HTTP/1.1"  # connections outlive their request


def _read_in_a_child(remote: ShardIndex) -> None:
    assert remote.read(2).key == "s002"
    gc.collect()


@pytest.mark.timeout(60)  # a parent whose connection was closed by its child waits for five minutes
def test_a_forked_reader_does_not_close_its_parents_connections(shards: Path, server: Server) -> None:
    server.RequestHandlerClass = functools.partial(_Lasting, directory=str(shards.parent))
    remote = ShardIndex.open(f"{server.address}/train", QUICK)
    assert remote.read(1).key == "s001"
    child = multiprocessing.get_context("fork").Process(target=_read_in_a_child, args=(remote,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert remote.read(3).key == "s003"


def test_the_cache_serves_a_second_epoch_within_its_limit(shards: Path, server: Server, tmp_path: Path) -> None:
    bound = 12_000
    remote = ShardIndex.open(
        f"{server.address}/train", StorageOptions(pause=0.01, cache=tmp_path / "c", cache_bytes=bound)
    )
    for _ in range(2):
        for i in range(6):
            remote.read(i)
    kept = [path.stat().st_size for path in (tmp_path / "c" / "ranges").glob("*.range")]
    assert 0 < sum(kept) <= bound
    assert len([name for name, _ in server.log if name.endswith(".tar")]) == 6
    for i in range(len(remote)):
        remote.read(i)
        assert sum(p.stat().st_size for p in (tmp_path / "c" / "ranges").glob("*.range")) <= bound


def test_the_cache_evicts_the_least_recently_used(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 100)
    for number, name in enumerate("abcd"):
        cache.put(name, name.encode() * 25)
        os.utime(cache._path(name), ns=(number, number))
    assert cache.get("a") == b"a" * 25  # now the most recently used
    cache.put("e", b"e" * 30)
    assert [cache.get(name) is not None for name in "abcde"] == [True, False, False, True, True]
    cache.put("f", b"f" * 101)
    assert cache.get("f") is None


def test_damaged_or_outdated_ranges_in_the_cache_make_no_sample_bad(
    shards: Path, server: Server, tmp_path: Path
) -> None:
    def reading() -> int:
        """Read and compare all samples. Returns the number of requests for tars."""
        server.log.clear()
        same_samples(ShardIndex.open(f"{server.address}/train", access), ShardIndex.open(shards))
        return len([name for name, _ in server.log if name.endswith(".tar")])

    access = StorageOptions(pause=0.01, cache=tmp_path / "c", cache_bytes=1 << 20)
    assert (reading(), reading()) == (23, 0)
    one, two, *_ = sorted((tmp_path / "c" / "ranges").glob("*.range"))
    one.write_bytes(one.read_bytes()[:-1] + b"?")
    two.write_bytes(two.read_bytes()[:-9])  # cut off by a crash
    assert (reading(), reading()) == (2, 0)
    renamed = [replace(record(i), fields={**record(i).fields, "answer": "may" if i % 2 else "be"}) for i in range(23)]
    write_shards(renamed, shards, samples_per_shard=7)  # annotations of the same lengths at the same places
    assert (reading(), reading()) == (23, 0)


def kept(folder: Path) -> int:
    """Total bytes of the ranges in a cache, complete or partial."""
    return sum(path.stat().st_size for path in (folder / "ranges").iterdir() if path.name not in (".lock", ".bytes"))


def test_a_process_killed_while_writing_does_not_exceed_the_limit(tmp_path: Path) -> None:
    def killed(number: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            RangeCache(tmp_path, 100).put(f"killed{number}", b"k" * 30)

    for number in range(5):
        RangeCache(tmp_path, 100).put(f"whole{number}", b"w" * 30)
        child = multiprocessing.get_context("fork").Process(target=killed, args=(number,))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert kept(tmp_path) <= 100
    assert RangeCache(tmp_path, 100).get("whole4") == b"w" * 30


def test_processes_share_the_limit(tmp_path: Path) -> None:
    def fill(process: int) -> None:
        cache = RangeCache(tmp_path, 1000)
        for number in range(60):
            cache.put(f"{process}-{number % 40}", bytes(10 + number))

    children = [multiprocessing.get_context("fork").Process(target=fill, args=(process,)) for process in range(4)]
    for child in children:
        child.start()
    seen = []
    while any(child.is_alive() for child in children) or not seen:
        with RangeCache(tmp_path, 1000)._locked():  # nothing is added or removed while the bytes are counted
            seen.append(kept(tmp_path))
    assert [child.exitcode for child in children] == [0] * 4
    assert max(seen) <= 1000
    assert kept(tmp_path) > 500


@pytest.mark.timeout(60)  # the lock would be held until the child ends
def test_a_child_forked_in_between_does_not_keep_the_lock(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 100)
    with cache._locked():
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,))
        child.start()
    cache.put("a", b"a")
    assert cache.get("a") == b"a"
    child.kill()
    child.join()


def test_a_full_disk_suspends_caching_and_is_logged_once(
    shards: Path, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    access = StorageOptions(pause=0.01, cache=tmp_path / "c", cache_bytes=1 << 20)
    remote = ShardIndex.open(f"{server.address}/train", access)
    (tmp_path / "c" / "ranges").write_text("a file where the folder should be")
    same_samples(remote, ShardIndex.open(shards))
    assert len([r for r in caplog.records if "is suspended" in r.message]) == 1
    (tmp_path / "c" / "ranges").unlink()
    assert remote.read(3).key == "s003"
    assert len(list((tmp_path / "c" / "ranges").glob("*.range"))) == 1


def test_an_index_that_cannot_be_stored_is_named_with_its_folder(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"http\S+/train cannot be stored in \S+file/medalign.*data\.cache_dir"):
        ShardIndex.open(f"{server.address}/train", QUICK)


def test_nodes_that_fetch_one_index_into_one_folder_do_not_collide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, target, whole = fsspec.filesystem("memory"), tmp_path / "index.jsonl", b"x" * 100
    memory.pipe("/nodes/index.jsonl", whole)
    remote, get_file = byte_ranges.RemoteStorage(QUICK), type(memory).get_file

    def slow(*arguments: object) -> None:
        monkeypatch.setattr(type(memory), "get_file", get_file)
        remote.copy("memory://nodes/index.jsonl", target)  # in the meantime, a process of another node with the same id
        get_file(*arguments)

    monkeypatch.setattr(type(memory), "get_file", slow)
    remote.copy("memory://nodes/index.jsonl", target)
    assert target.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [target]


def test_the_processes_of_a_node_wait_for_one_another(tmp_path: Path) -> None:
    """Processes wait while one of them fetches or maps the index for all."""
    inside = multiprocessing.get_context("fork").Event()

    def enter() -> None:
        with file_lock(tmp_path):
            inside.set()

    other = multiprocessing.get_context("fork").Process(target=enter)
    with file_lock(tmp_path):
        other.start()
        assert not inside.wait(0.5)
    assert inside.wait(20)
    other.join()


def test_an_index_of_unknown_size_is_fetched_again(shards: Path, server: Server) -> None:
    server.lengths = False
    for _ in range(2):
        same_samples(ShardIndex.open(f"{server.address}/train", QUICK), ShardIndex.open(shards))
    assert [wanted for name, wanted in server.log if name == "index.jsonl" and wanted is None]


def test_any_fsspec_address(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/train/{path.name}", path.read_bytes())
    same_samples(ShardIndex.open("memory://train", QUICK), ShardIndex.open(shards))
    with pytest.raises(ConfigError, match=r"pipe:.*not read through a shell"):
        ShardIndex.open("pipe:cat shard.tar")
    with pytest.raises(ConfigError, match=r"xyz://a.*pip install s3fs"):
        ShardIndex.open("xyz://a")
