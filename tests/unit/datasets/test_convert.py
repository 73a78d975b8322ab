"""Conversions give the same bytes with any number of processes and interruptions; names are hashed on request."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from medalign.__main__ import main
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Record
from medalign.datasets import REGISTRY, files, get_converter
from medalign.datasets import parts as parts_module
from medalign.datasets.convert import convert
from medalign.datasets.hashing import Hashing, default_salt, read_salt
from medalign.datasets.pool import run_in_processes
from medalign.datasets.report import kind
from medalign.errors import ConfigError, DataError
from tests.unit.data.tiny_data import picture
from tests.unit.datasets.conversion import skipped

JSONL = get_converter("jsonl")


def write_folder(path: Path, count: int = 23, bad: bool = True) -> Path:
    """Questions of two splits; with `bad`, one in seven names a missing image."""
    (path / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        name = f"images/{'lost' if bad and i % 7 == 3 else 'scan'}-{i}.png"
        if "scan" in name:
            (path / name).write_bytes(picture(i))
        row = {"id": f"patient-{i}", "image": name, "case": f"case-{i // 2}", "task": "vqa", "question": "clear ?"}
        lines.append(json.dumps({**row, "answer": "yes", "split": "test" if i % 4 == 0 else "train"}))
    (path / "annotations.jsonl").write_text("\n".join(lines))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_one_worker_and_two_write_the_same_bytes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    for workers in (1, 2):
        seen: list[tuple[int, int]] = []
        account = convert(
            JSONL,
            source,
            tmp_path / str(workers),
            samples_per_shard=5,
            workers=workers,
            progress=lambda done, total: seen.append((done, total)),  # noqa: B023  # called only within this iteration
        )
        assert (seen[0], seen[-1]) == ((0, 23), (23, 23))
        assert account.reasons() == {"image ... cannot be read": 3}
        assert {n: (r.written, r.shards) for n, r in account.splits.items()} == {"test": (6, 2), "train": (14, 4)}
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert ShardIndex.open(tmp_path / "2" / "test").keys == [f"patient-{i}" for i in (0, 4, 8, 12, 16, 20)]


def stop_after(count: int) -> Callable[[int, int], None]:
    def progress(done: int, _total: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_conversion_is_resumed(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    convert(JSONL, source, tmp_path / "whole", samples_per_shard=4, workers=1)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(JSONL, source, out, samples_per_shard=4, workers=1, progress=stop_after(14))
    assert [path.name for path in out.iterdir()] == [".conversion"]  # no incomplete shards where they are searched for
    seen: list[tuple[int, int]] = []
    convert(JSONL, source, out, samples_per_shard=4, workers=1, progress=lambda *step: seen.append(step))
    assert seen[0] == (10, 23)  # test: parts of 4 and 2; train: the finished part of 4
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["size", "annotations", "folder"])
def test_other_settings_restart_the_conversion(tmp_path: Path, change: str) -> None:
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(JSONL, source, out, samples_per_shard=4, workers=1, progress=stop_after(14))
    if change == "folder":  # with the same annotations, and perhaps other images
        source = source.rename(tmp_path / "other")
    if change == "annotations":
        path = source / "annotations.jsonl"
        path.write_text(path.read_text().replace("clear ?", "clear now ?"))
    seen: list[tuple[int, int]] = []
    convert(
        JSONL,
        source,
        out,
        samples_per_shard=3 if change == "size" else 4,
        workers=1,
        progress=lambda *step: seen.append(step),
    )
    assert seen[0] == (0, 23)


def test_stopped_between_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    convert(JSONL, source, tmp_path / "whole", samples_per_shard=4, workers=1)
    real = parts_module.join_shards
    joined: list[str] = []

    def join(parts, output):
        if output.name == "train" and not joined.count("train"):
            joined.append("train")
            raise OSError(28, "No space left on device")
        joined.append(output.name)
        return real(parts, output)

    monkeypatch.setattr(parts_module, "join_shards", join)
    with pytest.raises(DataError, match="No space left on device; run the same command to continue"):
        convert(JSONL, source, out, samples_per_shard=4, workers=1)
    convert(JSONL, source, out, samples_per_shard=4, workers=1)
    assert joined == ["test", "train", "train"]  # the finished split was not joined again
    assert contents(out) == contents(tmp_path / "whole")


def test_killed_and_started_again(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 3000, bad=False)
    convert(JSONL, source, tmp_path / "whole", samples_per_shard=20, workers=1)
    command = [sys.executable, "-m", "medalign", "shards", "jsonl", "--input", str(source), "--workers", "2"]
    command += ["--output", str(tmp_path / "out"), "--samples-per-shard", "20"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out" / ".conversion" / "test"
    while not (parts / "part-000001.json").exists():
        assert process.poll() is None, "the command ended before it could be killed"
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2
    assert (
        psutil.wait_procs(workers, timeout=20)[1] == []
    )  # no process survives that could write at the same time as the next command
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".conversion"]
    (tmp_path / "out" / ".train.partial-77").mkdir()  # as if the command was killed while joining the split
    seen: list[tuple[int, int]] = []
    convert(JSONL, source, tmp_path / "out", samples_per_shard=20, workers=1, progress=lambda *step: seen.append(step))
    assert 40 <= seen[0][0] < 3000  # two finished parts at least
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out" / ".train.partial-77").exists()


def test_two_conversions_do_not_mix(tmp_path: Path) -> None:
    source, work = write_folder(tmp_path / "in"), tmp_path / "out" / ".conversion"
    work.mkdir(parents=True)
    with (work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another conversion is writing to"):
            convert(JSONL, source, tmp_path / "out", workers=1)
    assert convert(JSONL, source, tmp_path / "out", workers=1).written == 20


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    (out / "train").mkdir(parents=True)
    (out / "train" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        convert(JSONL, source, out, workers=1)
    assert contents(out) == {"train/thesis.txt": b"precious"}


def test_splits_of_an_earlier_conversion_do_not_remain_next_to_new_ones(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    convert(JSONL, source, out, workers=1)
    lines = (source / "annotations.jsonl").read_text()
    for path in (source / "images").iterdir():
        if int(path.stem.split("-")[1]) % 4 == 0:
            path.write_bytes(b"")
    assert convert(JSONL, source, out, workers=1).splits["test"].written == 0
    assert not (out / "test").exists()
    (source / "annotations.jsonl").write_text(lines.replace('"train"', '"all"').replace('"test"', '"all"'))
    with pytest.raises(DataError, match="out/train is a split that this conversion does not write"):
        convert(JSONL, source, out, workers=1)


@pytest.mark.parametrize("words", [[], ["--hash-ids"]])
@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_an_output_that_cannot_be_a_folder(
    tmp_path: Path, below: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source, file = write_folder(tmp_path / "in"), tmp_path / "film.png"
    file.write_bytes(b"precious")
    assert main(["shards", "jsonl", "--input", str(source), "--output", str(file / below), *words]) == 2
    message = capsys.readouterr().err
    assert f"{file} is a file" in message or "the salt" in message
    assert "to continue" not in message
    assert file.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["jsonl", "--workers", "none"], "argument --workers: 'none' is not a whole number of at least 1"),
        (
            ["jsonl", "--samples-per-shard", "0"],
            "argument --samples-per-shard: '0' is not a whole number of at least 1",
        ),
        (["llava", "--test-share", "half"], "argument --test-share: 'half' is not a number from 0 to 1"),
        (["llava", "--test-share", "1.5"], "argument --test-share: '1.5' is not a number from 0 to 1"),
    ],
)
def test_invalid_numbers_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shards", *words])
    assert message in capsys.readouterr().err


def test_no_usable_sample_is_an_error(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 4, bad=False)
    for path in (source / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"gives the reasons: 4 x image cannot be decoded; first: patient-0: image c"):
        convert(JSONL, source, tmp_path / "out", workers=1)
    assert list(contents(tmp_path / "out")) == ["conversion.json"]


def test_a_conversion_without_listed_samples_has_a_report(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "annotations.jsonl").write_text('{"id": 7}\n{"id": 8}')
    reasons = r"\(2 x id is \.\.\.; first: annotations\.jsonl line 1: id is 7.*conversion\.json lists them all"
    with pytest.raises(DataError, match=rf"lists no sample .*{reasons}"):
        convert(JSONL, source, tmp_path / "out", workers=1)
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert [one["key"] for one in report["skipped_samples"]] == ["annotations.jsonl line 1", "annotations.jsonl line 2"]
    (tmp_path / "file").write_text("precious")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "annotations.jsonl").write_text("\n")
    with pytest.raises(DataError, match="none lists no sample; its annotations are empty"):
        convert(JSONL, tmp_path / "none", tmp_path / "out", workers=1)
    with pytest.raises(DataError, match=r"first: annotations\.jsonl line 1.*; the reasons cannot be written to"):
        convert(JSONL, source, tmp_path / "file" / "out", workers=1)


def test_notes_are_counted_over_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = files.as_png_or_jpeg
    monkeypatch.setattr(files, "as_png_or_jpeg", lambda data: replace(plain(data), notes=("first frame only",)))
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(JSONL, source, out, samples_per_shard=4, workers=1, progress=stop_after(14))
    account = convert(JSONL, source, out, samples_per_shard=4, workers=1)
    assert account.notes == {"first frame only": 20}  # of all written samples, including those before the interruption
    assert json.loads((out / "conversion.json").read_text())["notes"] == {"first frame only": 20}


def die(_job: int, _report: Callable[[int], object]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(job: int, report: Callable[[int], object]) -> None:
    report(1)
    raise DataError(f"job {job} failed")


def test_killed_and_failing_processes_are_reported() -> None:
    with pytest.raises(DataError, match="a converting process was killed"):
        run_in_processes(die, [1, 2], 2)
    with pytest.raises(DataError, match="job . failed"):
        run_in_processes(fail, [1, 2], 2)


def dawdle(_job: int, report: Callable[[int], object]) -> None:
    for _ in range(6000):
        report(1)
        time.sleep(0.05)


def test_an_interrupt_ends_running_jobs_at_once() -> None:
    def interrupt(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_processes(dawdle, [1, 2], 2, interrupt)
    assert time.monotonic() - begun < 200  # the jobs would take 300 s; the rest is the start of two interpreters


def test_hashed_names(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    hashing = Hashing(b"0123456789abcdef")
    account = convert(JSONL, source, tmp_path / "out", workers=1, hashing=hashing)
    plain = convert(JSONL, source, tmp_path / "plain", workers=1)
    index, known_index = (ShardIndex.open(tmp_path / name / "train") for name in ("out", "plain"))
    assert index.keys == [hashing.name(key) for key in known_index.keys]
    assert all(len(key) == 32 for key in index.keys)
    one, known_one = index.read(0).metadata, known_index.read(0).metadata
    assert one["case"] == hashing.name(known_one["case"])
    assert (one["split"], index.read(0).question) == ("train", "clear ?")
    assert skipped(account) == {hashing.name(key): "image ... cannot be read" for key in skipped(plain)}
    everything = b"".join(contents(tmp_path / "out").values())
    for name in (b"patient-", b"case-", b"scan-", b"lost-"):
        assert name not in everything
        assert name in b"".join(contents(tmp_path / "plain").values())
    again = convert(JSONL, source, tmp_path / "other", workers=1, hashing=Hashing(b"another salt, longer"))
    assert skipped(again).keys().isdisjoint(skipped(account).keys())


def test_more_fields_and_lists_are_hashed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    row = {
        "id": "a",
        "image": None,
        "task": "vqa",
        "question": "q",
        "answer": "a",
        "case": None,
        "ward": ["b", "c", ""],
    }
    (tmp_path / "in" / "annotations.jsonl").write_text(json.dumps(row))
    hashing = Hashing(b"0123456789abcdef", frozenset({"id", "case", "ward"}))
    convert(JSONL, tmp_path / "in", tmp_path / "out", workers=1, hashing=hashing)
    metadata = ShardIndex.open(tmp_path / "out" / "train").read(0).metadata
    missing = hashing.record(Record("a", (), {"case": float("nan")})).fields["case"]
    assert math.isnan(missing)  # a missing value, so that rows without a name do not become one case
    assert metadata["ward"] == [hashing.name("b"), hashing.name("c"), ""]
    assert metadata["case"] is None


def test_the_salt_is_created_once_for_its_owner(tmp_path: Path) -> None:
    path = default_salt(tmp_path / "out")
    assert path == tmp_path / "out.salt"
    assert path.stat().st_mode & 0o777 == 0o600
    salt = read_salt(path)
    assert len(salt) == 64
    assert read_salt(default_salt(tmp_path / "out")) == salt
    (tmp_path / "short").write_text("too short")
    with pytest.raises(ConfigError, match="has 9 bytes; at least 16"):
        read_salt(tmp_path / "short")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_salt(tmp_path / "none")


def test_command_with_hashes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_folder(tmp_path / "in")
    command = ["shards", "jsonl", "--input", str(source), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--hash-ids"]) == 0
    keys = ShardIndex.open(tmp_path / "out" / "train").keys
    hashing = Hashing(read_salt(tmp_path / "out.salt"))
    assert hashing.name("patient-1") in keys
    assert main([*command, "--hash-ids", "--salt", str(tmp_path / "out.salt")]) == 0
    assert ShardIndex.open(tmp_path / "out" / "train").keys == keys
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["splits"] == {"test": {"written": 6, "shards": 1}, "train": {"written": 14, "shards": 1}}
    assert report["skipped"] == {"image ... cannot be read": 3}
    assert (tmp_path / "out" / "conversion.json").stat().st_mode & 0o777 == 0o600
    assert main([*command, "--salt", str(tmp_path / "out.salt")]) == 2


def test_refused_samples_are_named_unless_names_are_hashed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_folder(tmp_path / "in")
    command = ["shards", "jsonl", "--input", str(source), "--workers", "1", "--output"]
    assert main([*command, str(tmp_path / "named")]) == 0
    named = re.findall(r"refused (\S+): image 'images/(\S+)' cannot be read", capsys.readouterr().err)
    assert len(named) == 3
    assert main([*command, str(tmp_path / "hashed"), "--hash-ids"]) == 0
    message = capsys.readouterr().err
    assert "3 x refused: image ... cannot be read" in message
    assert f"all refused samples are listed in {tmp_path / 'hashed' / 'conversion.json'}" in message
    assert not any(key in message or picture in message for key, picture in named)


def test_half_characters_do_not_end_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_folder(tmp_path / "in", 2, bad=False)
    half = {"id": "\ud83d", "image": None, "task": "vqa", "question": "q", "answer": "a"}
    rows = [half, {**half, "id": "x", "answer": "ok \ud83d"}, {**half, "id": "y", "split": "\ud83d"}]
    with (source / "annotations.jsonl").open("a") as file:
        file.write("\n" + "\n".join(map(json.dumps, rows)))
    command = ["shards", "jsonl", "--input", str(source), "--output", str(tmp_path / "out"), "--workers", "1"]
    for words, count in (
        ([], 3),
        (["--split", "image"], 3),
        (["--hash-ids"], 2),
    ):  # the hash of half a character is valid text
        assert main([*command, *words]) == 0
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert "Logging error" not in message
        assert len(json.loads((tmp_path / "out" / "conversion.json").read_text())["skipped_samples"]) == count


@pytest.mark.parametrize("name", REGISTRY)
def test_every_converter_explains_its_layout(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["shards", name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert get_converter(name).layout in shown
    assert all(f"--{setting.name}" in shown for setting in get_converter(name).settings)


def test_unknown_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--input", str(tmp_path), "--output", str(tmp_path / "out")]
    for words in (["shards", "flickr", *place], ["shards", "vqa-rad", *place, "--test-share", "2"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
    assert "--test-share" in capsys.readouterr().err
    assert main(["shards", "slake", *place]) == 2
    with pytest.raises(ConfigError, match="there is no converter 'flickr'; choose one of jsonl, iu-xray"):
        get_converter("flickr")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("image 'files/p10/x.jpg' cannot be read: No such file", "image ... cannot be read"),
        ("image cannot be decoded (image file is truncated (3 bytes))", "image cannot be decoded"),
        (
            "box [1, 2, 50.0, 9] is outside the image of 40 x 24 pixels",
            "box ... is outside the image of ... x ... pixels",
        ),
        ("answer is empty; task vqa requires text", "answer is empty"),
        ("key 'a.b' must have 1 to 80 bytes", "key ... must have ... to ... bytes"),
        ("file annotations.jsonl is damaged", "file ... is damaged"),
        ("task is 'caption'; it must be 'vqa' or 'report'", "task is ..."),
        ("mask has 160 x 130 pixels, the image 160 x 120", "mask has ... x ... pixels, the image ... x ..."),
    ],
)
def test_general_reasons_contain_no_names(reason: str, expected: str) -> None:
    assert kind(reason) == expected
