"""Invalid text and numbers are refused by one check, with the same message in packing, indexing and reading."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medalign.__main__ import main
from medalign.contracts import Sample
from medalign.data.batches.collator import Collator, Prepared
from medalign.data.batches.loader import TrainLoader
from medalign.data.order.order import GlobalOrder
from medalign.data.samples.faults import as_bad_sample
from medalign.data.samples.sample import REPORT_PROMPT, BadSample
from medalign.data.samples.values import MAX_NESTING, fault
from medalign.data.shards import index as index_module
from medalign.data.shards import tar_samples
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.writer import build_index
from medalign.errors import DataError
from tests.unit.data.batches.test_loader import collator
from tests.unit.data.foreign_tars import ANNOTATION, FILM, file, indexed, sample, write
from tests.unit.data.tiny_data import batches, picture, record

ASKED = '"task": "vqa", "question": "is there a nodule ?", "answer": "no"'
DEEP = "[" * 100 + "]" * 100

# annotation -> reason for refusing it, or None if it is used
ANNOTATIONS = {
    f"{{{ASKED}}}": None,
    f'{{{ASKED}, "answer_type": "open", "age": 61, "note": null, "sure": true, "seen": [1.5, "x"]}}': None,
    '{"task": "report", "report": "Clear lungs \\ud83e\\udec1."}': None,  # a whole emoji, escaped in halves
    f'{{{ASKED}, "boxes": [[1, 2, 9.5, 12]]}}': None,
    '{"task": "vqa", "question": "is ?", "answer": "ok \\ud83d"}': "answer contains half a character (U+D83D)",
    '{"task": "vqa", "question": "\\udec1 is ?", "answer": "ok"}': "question contains half a character (U+DEC1)",
    '{"task": "report", "report": "clear\\u0000"}': "report contains the character NUL (U+0000)",
    f'{{{ASKED}, "case": {{"names": ["\\ud83d"]}}}}': "case contains half a character (U+D83D)",
    f'{{{ASKED}, "case": {{"\\ud83d": 1}}}}': "case contains half a character (U+D83D)",
    f'{{{ASKED}, "\\ud83d": 1}}': "contains half a character (U+D83D)",
    f'{{{ASKED}, "age": NaN}}': "age contains nan, which is not a usable number",
    f'{{{ASKED}, "age": [-Infinity]}}': "age contains -inf, which is not a usable number",
    f'{{{ASKED}, "age": 1e999}}': "age contains inf, which is not a usable number",
    f'{{{ASKED}, "age": {"9" * 400}}}': "age contains an integer of 1329 bits, which is not a usable number",
    f'{{{ASKED}, "boxes": [[1, 2, 9, {"9" * 400}]]}}': "is outside the image",
    f'{{{ASKED}, "boxes": [[1, 2, 9, NaN]]}}': "not four numbers",
    f'{{{ASKED}, "boxes": {DEEP}}}': f"deeper than {MAX_NESTING} levels",
    f'{{{ASKED}, "notes": {DEEP}}}': f"deeper than {MAX_NESTING} levels",
    '{"task": "vqa", "question": "is ?", "answer": NaN}': "answer",
    '{"task": "vqa", "question": "is ?", "answer": true}': "answer is True; task vqa requires text",
    '{"task": "vqa", "question": "is ?", "answer": ["no"]}': "answer is ['no']; task vqa requires text",
    '{"task": "vqa", "question": " ", "answer": "no"}': "question is ' '; task vqa requires text",
    '{"task": "vqa", "question": "<image>\\n<image> is ?", "answer": "no"}': "contains 2 <image>, but the sample",
    '{"task": "vqa", "question": "<image>\\nis ?", "answer": "no"}': None,
    '{"task": "vqa", "question": "<image>\\n", "answer": "no"}': "question is",
    '{"task": "vqa", "question": "<ImageHere> is ?", "answer": "no"}': "'<ImageHere>'; write <image>",
    '{"task": "report", "question": "<image>", "report": "Clear."}': None,
    '{"task": "vqa", "question": "is ?", "answer": "<image> no"}': "the answer contains <image>",
    '{"task": "vqa", "question": "is ?", "answer": "<ImageHere> no"}': "'<ImageHere>'; write <image>",
    '{"task": "report", "report": "Clear.\\n<image>"}': "the report contains <image>",
    '{"task": "report", "report": "Clear.", "answer": "<image>"}': "the answer contains <image>",
    '{"task": "vqa", "question": "is ?", "answer": "no \\ufdd0"}': "answer contains a noncharacter of Unicode (U+FDD0)",
    '{"task": "report", "report": "Clear.\ufdd1"}': "report contains a noncharacter of Unicode (U+FDD1)",
    f'{{{ASKED}, "case": ["\ufdd1"]}}': "case contains a noncharacter of Unicode (U+FDD1)",
    f'{{{ASKED}, "answer_type": "CLOSED"}}': None,
    f'{{{ASKED}, "answer_type": " Open\\n"}}': None,
    f'{{{ASKED}, "answer_type": ["closed"]}}': "answer_type is ['closed']",
    f'{{{ASKED}, "answer_type": "perhaps"}}': "answer_type is 'perhaps'",
    '{"task": "segment"}': "task is 'segment'",
    f"{{{ASKED}": "not JSON",
    f'{{{ASKED}, "age": {"9" * 5000}}}': "digits",
}


@pytest.fixture(scope="module")
def refused_by(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The reason of each refused annotation by its index, for packing and for indexing."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "lines").mkdir()
    (folder / "lines/film.png").write_bytes(FILM)
    lines = [f'{{"id": "k{i:02d}", "image": "film.png", {text[1:]}\n' for i, text in enumerate(ANNOTATIONS)]
    (folder / "lines/annotations.jsonl").write_text("".join(lines))
    words = ["--input", str(folder / "lines"), "--output", str(folder / "packed"), "--workers", "1"]
    assert main(["shards", "jsonl", *words]) == 0
    account = json.loads((folder / "packed/conversion.json").read_text())
    packed = {one["key"].replace("annotations.jsonl line ", ""): one["reason"] for one in account["skipped_samples"]}

    members = [
        member
        for i, text in enumerate(ANNOTATIONS)
        for member in (file(f"k{i:02d}.png", FILM), file(f"k{i:02d}.json", text.encode()))
    ]
    refused = build_index(write(folder / "tars/a.tar", *members)).refused
    found = dict(line.removeprefix("a.tar/").split(": ", 1) for line in refused)
    return {
        "jsonl": {key if key.startswith("k") else f"k{int(key) - 1:02d}": reason for key, reason in packed.items()},
        "index": found,
    }


@pytest.mark.parametrize("number", range(len(ANNOTATIONS)))
def test_packing_and_indexing_refuse_the_same(refused_by: dict[str, dict[str, str]], number: int) -> None:
    reason = list(ANNOTATIONS.values())[number]
    for way, refused in refused_by.items():
        found = refused.get(f"k{number:02d}")
        assert (found is None) == (reason is None), (way, found)
        assert reason is None or reason in str(found), (way, found)


def test_image_tags_are_removed_from_a_question(tmp_path: Path) -> None:
    texts = {"a": {**record(1).fields, "boxes": [], "question": "<image>\nis it clear ?"}}
    texts["b"] = {"task": "report", "report": "Clear.", "question": "<image>"}
    members = [
        m
        for key, text in texts.items()
        for m in (file(f"{key}.png", FILM), file(f"{key}.json", json.dumps(text).encode()))
    ]
    build_index(write(tmp_path / "a.tar", *members))
    index = ShardIndex.open(tmp_path)
    assert [index.read(i).question for i in range(2)] == ["is it clear ?", REPORT_PROMPT]


def test_messages_are_one_short_line(tmp_path: Path) -> None:
    long, pointer = "k" * 3000, b"version https://git-lfs.github.com/spec/v1\n"
    box = json.dumps({**record(1).fields, "boxes": [[1, 2, 10**400, 9], [1, 2, -(10**400), 9]]}).encode()
    texts = {"a\nb": ANNOTATION, long: ANNOTATION, "box": box, "pointer": pointer}
    members = [m for key, text in texts.items() for m in (file(f"{key}.png", FILM), file(f"{key}.json", text))]
    report, _ = indexed(write(tmp_path / "a.tar", *members, file("p.png", pointer), file("p.json", ANNOTATION)))
    ends = "k" * 60
    message = "a Git LFS pointer; fetch the file itself with `git lfs pull`"
    assert report.refused[0].startswith(r"a.tar/a\nb: key 'a\nb' must have")
    assert report.refused[1].startswith(f"a.tar/{ends}...{ends}: key 'kkk")
    assert report.refused[2].startswith("a.tar/box: box [1, 2, 1000")
    assert report.refused[3:] == (f"a.tar/pointer: annotation is {message}", f"a.tar/p: image is {message}")
    assert all("\n" not in line and len(line) < 320 for line in report.refused)


def test_an_answer_type_in_capitals_is_accepted(tmp_path: Path) -> None:
    text = json.dumps({**record(1).fields, "boxes": [], "answer_type": " CLOSED"}).encode()
    build_index(write(tmp_path / "a.tar", file("a.png", FILM), file("a.json", text)))
    index = ShardIndex.open(tmp_path)
    assert (index.answer_type(0), index.read(0).answer_type) == ("closed", "closed")


def test_masks_are_checked_when_packing_and_indexing(tmp_path: Path) -> None:
    small = [*sample("a"), file("a.mask.png", picture(1, 5, 5))]
    film = [*sample("b"), file("b.mask.png", picture(1, kind="jpg"))]
    alone = [file("c.json", ANNOTATION), file("c.mask.png", FILM)]
    report, images = indexed(write(tmp_path / "a.tar", *small, *film, *alone, *sample("d")))
    assert images == {"d": 1}
    assert report.refused == (
        "a.tar/a: mask has 5 x 5 pixels, the image 40 x 24",
        "a.tar/b: mask is jpg; only PNG stores it without loss",
        "a.tar/c: a mask is given, but there is no image",
    )


def test_annotations_that_cannot_be_parsed(tmp_path: Path) -> None:
    texts = {
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "blank": b" \n",
        "list": b"[1]",
        "latin": b'{"task": "caf\xe9"}',
        "twice": b'{"task": "vqa", "question": "a?", "answer": "yes", "answer": "no"}',
    }
    members = [
        member for key, text in texts.items() for member in (file(f"{key}.png", FILM), file(f"{key}.json", text))
    ]
    report, images = indexed(write(tmp_path / "a.tar", *members, *sample("z")))
    assert images == {"z": 1}
    found = dict(line.split(": ", 1) for line in report.refused)
    assert found["a.tar/deep"] == "annotation is not readable JSON (it is nested too deep)"
    assert found["a.tar/blank"] == "annotation is empty"
    assert found["a.tar/list"] == "annotation is a JSON list, not an object"
    assert found["a.tar/twice"] == "field 'answer' occurs twice in one object; keep one of them"
    assert found["a.tar/latin"].startswith("annotation is not JSON ('utf-8' codec can't decode")


def test_a_sample_that_an_older_index_lists_is_refused_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = json.dumps({**record(1).fields, "boxes": [], "answer": "ok \ud83d"}).encode()
    write(tmp_path / "old/a.tar", file("a.png", FILM), file("a.json", broken), *sample("b"))
    with monkeypatch.context() as before:
        before.setattr(tar_samples, "check_fields", lambda *_: None)
        assert build_index(tmp_path / "old").written == 2
    index = ShardIndex.open(tmp_path / "old")
    with pytest.raises(BadSample, match=r"^old/a\.tar/a: answer contains half a character"):
        index.read(0)
    ((batch,),) = [next(iter(train(index)))]
    assert (batch.keys, batch.skipped) == (("b", "b"), ("old/a.tar/a: answer contains half a character (U+D83D)",))


def train(index: ShardIndex, words: Collator | None = None) -> TrainLoader:
    order = GlobalOrder(len(index), 0, shuffle=False)
    return TrainLoader(index, order, words or collator(), global_batch=2, micro_batch=2)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=())), inner),
    max_leaves=8,
)


@given(VALUES)
def test_what_passes_can_be_written_as_strict_json_in_utf8(value: Any) -> None:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        writable = "\\u0000" not in text.decode() and not {*text.decode()} & {"\ufdd0", "\ufdd1"}
    except ValueError:
        writable = False
    assert (fault(value) is None) == writable


def test_numbers_and_levels_at_their_limits() -> None:
    nested: Any = 0
    for _ in range(MAX_NESTING):
        nested = [nested]
    assert fault(nested) is None
    assert fault([nested]) == f"is nested deeper than {MAX_NESTING} levels"
    assert fault([1.7e308, -(10**308), True, 2**64]) is None
    assert fault(10**309) is not None
    assert fault(math.nan, numbers=False) is None


class Own(Exception):
    """An exception that no decoder raises."""


FOREIGN = [
    TypeError("must be str"),
    OverflowError("too large"),
    KeyError("token"),
    RuntimeError("stopped"),
    Exception("unk"),
]


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_what_a_tokenizer_raises_is_one_bad_sample(shards: Path, error: Exception) -> None:
    class Failing(Collator):
        def prepare(self, sample: Sample) -> Prepared:
            if sample.key == "s001":
                raise error
            return super().prepare(sample)

    index, words = ShardIndex.open(shards), collator()
    words.__class__ = Failing
    (batch,) = next(iter(train(index, words)))
    expected = f"train/shard-000000.tar/s001: it cannot be used ({type(error).__name__}: {error})"
    assert (batch.keys, batch.skipped) == (("s000", "s002"), (expected,))
    read = list(batches(index, words, 30))
    assert [key for samples, _ in read for key in (one.key for one in samples)] == [
        key for key in index.keys if key != "s001"
    ]
    assert read[0][1].skipped == (expected,)


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_what_a_decoder_raises_is_one_bad_sample(
    shards: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(index_module, "decode_image", failing)
    with pytest.raises(BadSample, match=r"^train/shard-000000\.tar/s001: it cannot be used \("):
        ShardIndex.open(shards).read(1)


@pytest.mark.parametrize("error", [Own("a slip"), DataError("a lost shard"), KeyboardInterrupt()])
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, as_bad_sample("a"):
        raise error
    assert caught.value is error
