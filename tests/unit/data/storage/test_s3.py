"""Shards in an S3 bucket: a real local server, real signatures, and the real client."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
import requests
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from medalign.data.batches.loader import TrainLoader
from medalign.data.order.order import GlobalOrder
from medalign.data.shards.index import ShardIndex, _spans
from medalign.data.shards.listing import IMAGE, JSON
from medalign.data.storage import byte_ranges
from medalign.data.storage.byte_ranges import StorageOptions
from medalign.errors import ConfigError, DataError
from tests.unit.data.batches.test_loader import assert_same, collator, loader
from tests.unit.data.storage.test_storage import rename_last, same_samples

QUICK = StorageOptions(retries=4, pause=0.01)
READ_ALL = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Asked(NamedTuple):
    method: str
    name: str
    range: str | None


class Server:
    """moto's S3. Records every request; every second request for a tar fails, `troubles` in total, in three ways."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.asked: list[Asked] = []
        self.troubles = 0
        self.down = False  # every tar is answered with 503
        self._tars = count(1)
        self._lock = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        self.asked.append(Asked(environ["REQUEST_METHOD"], path.rpartition("/")[2], environ.get("HTTP_RANGE")))
        trouble = self._trouble() if path.endswith(".tar") and environ["REQUEST_METHOD"] == "GET" else None
        if trouble == 0:
            start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))])
            return [SLOW_DOWN]
        data = b"".join(self._moto(environ, start))
        if trouble == 1:
            environ["werkzeug.socket"].shutdown(2)  # before the first byte
        return [data if trouble is None else data[: len(data) // 2]]  # the connection ends in the middle

    def _trouble(self) -> int | None:
        with self._lock:
            if self.down:
                return 0
            if not self.troubles or next(self._tars) % 2:
                return None
            self.troubles -= 1
            return self.troubles % 3

    def tars(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.name.endswith(".tar")]

    def send(self, method: str, path: str, data: str | bytes = b"") -> None:
        """Send an unsigned request, which the server accepts as long as it requires no credentials."""
        requests.request(method, self.address + path, data=data, timeout=5).raise_for_status()

    def require_credentials(self, required: bool) -> None:
        self.send("POST", "/moto-api/reset-auth", "0" if required else "inf")

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def moto() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def s3(moto: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with the environment of this test only: no setting, credential or proxy of the machine is used."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_MAX_ATTEMPTS", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "AWS_ENDPOINT_URL": moto.address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "XDG_CACHE_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("fsspec.config.conf", {})
    moto.send("POST", "/moto-api/reset")
    moto.asked.clear()
    moto.troubles, moto.down = 0, False
    yield moto
    moto.require_credentials(False)


@pytest.fixture
def bucket(shards: Path, s3: Server) -> str:
    """The address of the uploaded shards."""
    s3.send("PUT", "/films")
    for path in shards.iterdir():
        s3.send("PUT", f"/films/chest/train/{path.name}", path.read_bytes())
    s3.asked.clear()
    return "s3://films/chest/train"


def test_a_bucket_gives_the_same_samples_by_ranges(shards: Path, s3: Server, bucket: str) -> None:
    remote, local = ShardIndex.open(bucket, QUICK), ShardIndex.open(shards)
    same_samples(remote, local)
    wanted = [
        (local.shard(i).rpartition("/")[2], f"bytes={start}-{start + length - 1}")
        for i in range(len(local))
        for start, length in _spans(local._members(i, (IMAGE, JSON)))
    ]
    assert s3.tars() == [Asked("GET", name, span) for name, span in wanted]
    assert len(wanted) == 23  # one request per sample, none for a complete shard
    assert all(local.read_mask(i) == remote.read_mask(i) for i in range(len(local)))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_an_unreliable_bucket_equal_those_from_disk(
    shards: Path, s3: Server, bucket: str, workers: int
) -> None:
    remote = ShardIndex.open(bucket, StorageOptions(retries=9, pause=0.01))
    assert remote.read(0).key == "s000"  # workers then come from a process with open connections
    s3.troubles = 9  # even if all of them affect one read, its last attempt succeeds
    far = TrainLoader(remote, GlobalOrder(23, 3), collator(), global_batch=6, micro_batch=3, workers=workers)
    for one, two in islice(zip(loader(shards), far, strict=False), 5):
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    assert s3.troubles == 0
    assert remote.read(1).key == "s001"  # which the workers did not close


def test_prefetches_share_one_client(s3: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = ShardIndex.open(bucket, QUICK)
    opened = []
    open_system = byte_ranges.open_system

    def slow(place: str, connections: int) -> object:
        opened.append(connections)
        time.sleep(0.1)  # long enough for all of them to arrive
        return open_system(place, connections)

    monkeypatch.setattr(byte_ranges, "open_system", slow)
    remote.prefetch(range(12))
    assert [remote.read(i).key for i in range(12)] == [f"s{i:03d}" for i in range(12)]
    assert opened == [QUICK.read_ahead]
    assert len(s3.tars()) == 12


def test_each_attempt_is_one_request(s3: Server, bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    remote = ShardIndex.open(bucket, StorageOptions(retries=2, pause=0.01))
    s3.down = True
    with pytest.raises(DataError, match=rf"{bucket}/shard-000000.tar cannot be read after 3 tries: .*reduce your"):
        remote.read(1)
    assert len(s3.tars()) == 3  # the client itself does not retry
    assert "retrying up to 2 times" in caplog.text


def test_what_is_missing_is_named(shards: Path, s3: Server, bucket: str) -> None:
    access = StorageOptions(retries=1, pause=0.01)
    s3.send("PUT", "/films/half/index.jsonl", (shards / "index.jsonl").read_bytes())
    lost = r"s3://films/half/shard-000002\.tar cannot be read after 2 tries: .*key does not exist.*moved, deleted"
    with pytest.raises(DataError, match=lost):
        ShardIndex.open("s3://films/half", access).read(15)
    with pytest.raises(DataError, match=r"s3://films/nowhere/index\.jsonl .*2 tries: .*key does not exist.*moved"):
        ShardIndex.open("s3://films/nowhere", access)
    with pytest.raises(DataError, match=r"s3://nobucket/train/index\.jsonl .*2 tries: .*bucket does not exist"):
        ShardIndex.open("s3://nobucket/train", access)


def test_only_valid_credentials_can_read(s3: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=READ_ALL)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    s3.require_credentials(True)
    access = StorageOptions(retries=1, pause=0.01)
    refused = r"films/chest/train/\S+ cannot be read after 2 tries: .*credentials .*AWS_ACCESS_KEY_ID"
    with pytest.raises(DataError, match=refused):  # credentials that do not exist
        ShardIndex.open(bucket, access)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    remote = ShardIndex.open(bucket, access)
    assert remote.read(1).key == "s001"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match=refused):
        ShardIndex.open(bucket, access).read(1)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match=rf"{bucket}.*Unable to locate credentials; .*AWS_ACCESS_KEY_ID"):
        ShardIndex.open(bucket, access).read(1)


def test_an_unreachable_server_is_named(s3: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # no server listens there
    began = time.monotonic()
    with pytest.raises(DataError, match=r"s3://films/\S+ .*3 tries: .*http://127\.0\.0\.1:1/.*AWS_ENDPOINT_URL"):
        ShardIndex.open(bucket, StorageOptions(retries=2, pause=0.01))
    assert time.monotonic() - began < 10  # three refusals, 0.3 s; with the client's own tries it takes 20 s
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=re.escape(f"{bucket}/index.jsonl") + ".*Invalid endpoint.*https://host:port"):
        ShardIndex.open(bucket, QUICK)


def test_with_the_cache_a_second_pass_requests_no_shard(s3: Server, bucket: str, tmp_path: Path) -> None:
    access = StorageOptions(pause=0.01, cache=tmp_path / "cache", cache_bytes=1 << 20)
    first = ShardIndex.open(bucket, access)
    read = [first.read(i).answer for i in range(len(first))]
    assert len(s3.tars()) == 23
    s3.asked.clear()
    again = ShardIndex.open(bucket, access)
    assert [again.read(i).answer for i in range(len(again))] == read
    last = (tmp_path / "train" / "index.jsonl").stat().st_size - 1  # the file is shorter than the part that is compared
    assert s3.asked == [
        Asked("HEAD", "index.jsonl", None),
        Asked("GET", "index.jsonl", f"bytes=0-{last}"),
    ]  # checks whether it changed


def test_a_rewritten_index_of_the_same_size_is_noticed(shards: Path, s3: Server, bucket: str) -> None:
    assert ShardIndex.open(bucket, QUICK).keys[-1] == "s022"
    rename_last(shards)
    boto3.client("s3").upload_file(shards / "index.jsonl", "films", "chest/train/index.jsonl")
    assert ShardIndex.open(bucket, QUICK).keys[-1] == "t022"
