"""Batches: geometry, padding, order, workers, resume, and what happens to bad samples."""

from __future__ import annotations

import io
import tarfile
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medalign.__main__ import main
from medalign.contracts import IGNORE, Batch, Sample
from medalign.data.batches import reader
from medalign.data.batches.collator import Collator, Prepared
from medalign.data.batches.loader import TrainLoader, ValidationLoader
from medalign.data.batches.reader import check_skip_rate
from medalign.data.order.order import GlobalOrder
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Record, json_bytes
from medalign.data.shards.writer import write_shards
from medalign.data.storage.byte_ranges import StorageOptions
from medalign.errors import ConfigError, DataError
from medalign.geometry import PreprocessCfg
from tests.unit.data.tiny_data import batches, images, picture, record
from tests.unit.data.tiny_text import encoder

STUDENT = PreprocessCfg(12, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
TEACHER = PreprocessCfg(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def collator(teacher: PreprocessCfg | None = TEACHER, **changes) -> Collator:
    return Collator(encoder(), STUDENT, teacher, **changes)


def sample(key: str, *images: Image.Image, question: str = "is there a nodule ?", answer: str = "yes") -> Sample:
    return Sample(key, "train/shard-000000.tar", "vqa", question, answer, "closed", images)


def loader(folder: Path, **changes) -> TrainLoader:
    index = ShardIndex.open(folder, StorageOptions(retries=1, pause=0.01))
    settings = {"global_batch": 6, "micro_batch": 3} | changes
    return TrainLoader(index, GlobalOrder(len(index), 3), collator(), **settings)


def assert_same(one: Batch, two: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, field.name


def test_collator_fills_every_field() -> None:
    wide, tall = Image.new("L", (30, 10), 255), Image.new("RGB", (9, 9), (255, 0, 0))
    got = collator()([sample("a", wide, question="a"), sample("b"), sample("c", tall, wide, answer="lungs clear")])
    assert got.keys == ("a", "b", "c")
    assert got.student_pixels.shape == (3, 3, 12, 12)
    assert got.teacher_pixels.shape == (3, 3, 16, 16)
    assert got.image_sample.tolist() == [0, 2, 2]
    assert got.image_questions == ("a", "is there a nodule ?", "is there a nodule ?")
    assert got.image_weight.tolist() == [1, 1, 1]
    assert got.input_ids.shape == got.labels.shape == got.image_index.shape == got.attention_mask.shape
    assert got.attention_mask.sum(1).tolist() == [3 + 9 + 1 + 2 + 2, 3 + 5 + 2 + 2, 3 + 18 + 5 + 2 + 3]
    assert got.attention_mask.dtype == got.question_mask.dtype == got.patch_valid.dtype == torch.bool
    assert [(got.image_index == i).sum(1).tolist() for i in range(3)] == [[9, 0, 0], [0, 0, 9], [0, 0, 9]]
    assert (got.input_ids[~got.attention_mask] == 0).all()
    assert (got.labels[~got.attention_mask] == IGNORE).all()
    assert (got.image_index[~got.attention_mask] == -1).all()
    assert not (got.question_mask & ~got.attention_mask).any()
    # 30 x 10 on a 3 x 3 grid: only the middle row shows the picture; 9 x 9 fills its canvas
    assert got.patch_valid[0].tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert got.patch_valid[1].all()


def test_both_views_show_one_canvas_padded_with_the_students_mean() -> None:
    got = collator()([sample("a", Image.new("L", (30, 10), 255))])
    student = got.student_pixels[0] * 0.2 + torch.tensor(STUDENT.mean)[:, None, None]
    teacher = got.teacher_pixels[0]
    for seen in (student, teacher):
        assert torch.allclose(seen[:, 0, 0], torch.tensor(STUDENT.mean), atol=1 / 255)
        assert torch.allclose(seen[:, seen.shape[1] // 2, 0], torch.ones(3), atol=1e-5)
    # The padding is the student's mean color, rounded to a whole gray level.
    assert got.student_pixels[0, :, 0, 0].abs().max() < 1 / 255 / 0.2


@pytest.mark.parametrize("teacher", [TEACHER, None])
def test_batch_without_image_gets_a_dummy(teacher: PreprocessCfg | None) -> None:
    got = collator(teacher)([sample("a"), sample("b", question="a")])
    assert got.student_pixels.shape == (1, 3, 12, 12)
    assert torch.allclose(got.student_pixels[0, :, 0, 0], -torch.tensor(STUDENT.mean) / 0.2)
    assert got.teacher_pixels.shape == ((1, 3, 16, 16) if teacher else (1, 3, 0, 0))
    assert got.image_weight.tolist() == [0]
    assert got.image_sample.tolist() == [0] and got.image_questions == ("",)
    assert (got.image_index == -1).all()
    assert not got.patch_valid.any()
    assert not got.question_mask.any()


def test_left_padding_without_answer() -> None:
    got = collator(None, padding_side="left", with_answer=False)([sample("a", question="a"), sample("b")])
    assert got.attention_mask.tolist() == [[False] * 4 + [True] * 6, [True] * 10]
    assert (got.labels == IGNORE).all()
    assert got.teacher_pixels.shape[2:] == (0, 0)


def test_packed_samples_lie_end_to_end() -> None:
    """A packed batch has the tokens of a padded one without the padding; masks and images stay with their samples."""
    wide, tall = Image.new("L", (30, 10), 255), Image.new("RGB", (9, 9), (255, 0, 0))
    samples = [sample("a", wide, question="a"), sample("b"), sample("c", tall, wide, answer="lungs clear")]
    padded, packed = collator()(samples), collator(packed=True)(samples)
    valid = padded.attention_mask
    assert packed.lengths == tuple(valid.sum(1).tolist())
    for name in ("input_ids", "attention_mask", "labels", "question_mask", "image_index"):
        assert torch.equal(getattr(packed, name), getattr(padded, name)[valid][None]), name
    for name in ("student_pixels", "teacher_pixels", "image_weight", "patch_valid", "image_sample", "keys"):
        a, b = getattr(packed, name), getattr(padded, name)
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, name
    owners = torch.arange(3).repeat_interleave(torch.tensor(packed.lengths))[None]
    assert torch.equal(packed.sample_of_token(), owners)
    assert torch.equal(padded.sample_of_token(), torch.arange(3)[:, None].expand_as(valid))
    dummy_batch = collator(packed=True).dummy_batch()
    assert (dummy_batch.labels == IGNORE).all() and dummy_batch.lengths == (dummy_batch.input_ids.shape[1],)


def test_workers_change_nothing(shards: Path) -> None:
    alone, helped = (loader(shards, workers=n) for n in (0, 2))
    for one, two in islice(zip(alone, helped, strict=True), 5):
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)


def test_resume_equals_uninterrupted(shards: Path) -> None:
    before = torch.get_rng_state()
    whole = list(islice(loader(shards), 9))  # 9 x 6 samples: past the second epoch of 23
    for one, two in zip(whole[4:], loader(shards, start_step=4), strict=False):
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    assert torch.equal(torch.get_rng_state(), before)  # the trainer's random state is not changed
    keys = [key for step in whole for batch in step for key in batch.keys]
    assert sorted(keys[:23]) == sorted(keys[23:46]) == ShardIndex.open(shards).keys


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_world_has_the_same_global_batches(shards: Path, world: int) -> None:
    ranks = [islice(loader(shards, micro_batch=1, rank=r, world=world), 5) for r in range(world)]
    steps = [[key for step in ranked for b in step for key in b.keys] for ranked in zip(*ranks, strict=True)]
    alone = [[key for b in step for key in b.keys] for step in islice(loader(shards, micro_batch=6), 5)]
    assert steps == alone


@pytest.mark.parametrize(("world", "workers"), [(4, 0), (4, 2), (8, 0)])
def test_ranks_that_do_not_divide_the_batch_take_equal_steps(shards: Path, world: int, workers: int) -> None:
    ranks = [list(islice(loader(shards, micro_batch=1, rank=r, world=world, workers=workers), 4)) for r in range(world)]
    assert {len(step) for ranked in ranks for step in ranked} == {-(-6 // world)}
    steps = [[key for step in ranked for b in step for key in b.keys] for ranked in zip(*ranks, strict=True)]
    assert steps == [[key for b in step for key in b.keys] for step in islice(loader(shards, micro_batch=6), 4)]
    empty = [b for ranked in ranks for step in ranked for b in step if not b.keys]
    assert len(empty) == 4 * (world * -(-6 // world) - 6)
    for batch in empty:  # runs through both towers and the student, and counts for nothing
        assert (batch.labels == IGNORE).all()
        assert batch.image_weight.tolist() == [0]
        assert not batch.question_mask.any()


def test_more_samples_in_a_batch_than_in_the_data(shards: Path) -> None:
    (batch,) = next(iter(loader(shards, global_batch=60, micro_batch=60)))
    every = sorted(ShardIndex.open(shards).keys)
    assert sorted(batch.keys[:23]) == sorted(batch.keys[23:46]) == every


def test_keys_in_folders_make_a_batch(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "theirs.tar", "w") as tar:
        for number, name in enumerate(("./train/0001", "train/0002", "val/0001")):
            for ending, data in (("png", picture(number)), ("json", json_bytes(record(number).fields))):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert main(["shards", "index", str(tmp_path)]) == 0
    (batch,) = next(iter(loader(tmp_path, global_batch=3, micro_batch=3)))
    assert sorted(batch.keys) == ["train/0001", "train/0002", "val/0001"]
    assert batch.student_pixels.shape == (3, 3, 12, 12)


def test_equal_keys_in_two_folders_stay_two_samples(tmp_path: Path) -> None:
    for name, answer in (("one", "yes"), ("two", "no")):
        write_shards([record(i, answer=answer) for i in range(4)], tmp_path / name)
    index = ShardIndex.open([tmp_path / "one", tmp_path / "two"])
    order = GlobalOrder(8, 0)
    (batch,) = next(iter(TrainLoader(index, order, collator(), global_batch=8, micro_batch=8)))
    assert sorted(batch.keys) == sorted(2 * [f"s{i:03d}" for i in range(4)])
    text = encoder().tokenizer
    learnt = [text.decode(ids[labels != IGNORE]) for ids, labels in zip(batch.input_ids, batch.labels, strict=True)]
    answers = ["yes" if number < 4 else "no" for number in order.take(0, 8)]
    assert [words.split()[0] for words in learnt] == answers


@pytest.mark.parametrize("side", [400, 90])
def test_large_jpegs_are_decoded_no_larger_than_the_towers_need(tmp_path: Path, side: int) -> None:
    seen: list[tuple[int, int]] = []

    class Watching(Collator):
        def prepare(self, sample: Sample) -> Prepared:
            seen.extend(image.size for image in sample.images)
            return super().prepare(sample)

    pictures = images(picture(1, side, side // 2, "jpg"), picture(2, side, side // 2))
    records = [Record(f"k{n}", (one,), record(1, boxes=[]).fields) for n, one in enumerate(pictures)]
    write_shards(records, tmp_path / "out")
    index = ShardIndex.open(tmp_path / "out")
    watching = Watching(encoder(), STUDENT, TEACHER)
    next(iter(TrainLoader(index, GlobalOrder(2, 0, shuffle=False), watching, global_batch=2, micro_batch=2)))
    (jpeg, png), most = seen, 16  # pixels per side of the larger tower
    assert png == (side, side // 2)
    assert most <= jpeg[0] < 2 * most or jpeg[0] == -(-side // 8)  # an eighth is the smallest scale of JPEG
    assert jpeg[0] < side


def test_batch_sizes_that_do_not_fit(shards: Path) -> None:
    with pytest.raises(ConfigError, match="micro-batch 0 and ranks 1 must be at least 1"):
        loader(shards, micro_batch=0)
    index = ShardIndex.open(shards)
    with pytest.raises(ConfigError, match="is for 5 samples, but the shards contain 23"):
        TrainLoader(index, GlobalOrder(5, 0), collator(), global_batch=1, micro_batch=1)


def damage(folder: Path, *numbers: int) -> None:
    """Flip a byte in the images of these samples."""
    for tar in folder.glob("*.tar"):
        data = bytearray(tar.read_bytes())
        for number in numbers:
            at = data.find(picture(number))
            if at >= 0:
                data[at + 50] ^= 0xFF
        tar.write_bytes(bytes(data))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_gets_the_next_one_and_is_named(shards: Path, workers: int) -> None:
    before = [b for step in islice(loader(shards), 4) for b in step]
    damage(shards, 3, 4)
    after = [b for step in islice(loader(shards, workers=workers), 4) for b in step]
    substitute = {"s003": "s005", "s004": "s005"}
    for old, new in zip(before, after, strict=True):
        assert new.keys == tuple(substitute.get(key, key) for key in old.keys)
        assert [s.split(": ")[0] for s in new.skipped] == [
            f"train/shard-000000.tar/{key}" for key in old.keys if key in substitute
        ]


def test_too_many_bad_samples_stop_the_run() -> None:
    check_skip_rate(1, 10, 0.01)  # one bad sample among the first hundred is always accepted
    check_skip_rate(100, 10_000, 0.01)
    with pytest.raises(DataError, match=r"2 of 10 samples .*max_skip_fraction 0\.01.*the last were a/b: checksum"):
        check_skip_rate(2, 10, 0.01, ["a/b: checksum"])
    with pytest.raises(DataError, match=r"101 of 10000 samples .*other ranks"):
        check_skip_rate(101, 10_000, 0.01)
    with pytest.raises(DataError, match="max_skip_fraction"):
        check_skip_rate(1, 10_000, 0.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_shard_lost_while_running_is_named(shards: Path, workers: int) -> None:
    ready = loader(shards, workers=workers)
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"^shard .*shard-000002\.tar cannot be read after 2 tries: No such file"):
        list(islice(ready, 10))


def test_all_samples_bad_is_an_error(tmp_path: Path) -> None:
    write_shards([record(1), record(2)], tmp_path / "two")
    damage(tmp_path / "two", 1, 2)
    with pytest.raises(DataError, match="none of the 2 samples"):
        next(iter(loader(tmp_path / "two")))
    assert list(batches(ShardIndex.open(tmp_path / "two"), collator(), 2)) == []


def test_the_search_for_a_replacement_is_limited(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_REPLACEMENT_DISTANCE", 3)
    damage(shards, 6, 7, 11, 12, 13)
    order = GlobalOrder(23, 0, shuffle=False)
    steps = iter(TrainLoader(ShardIndex.open(shards), order, collator(), global_batch=9, micro_batch=3))
    assert next(steps)[2].keys == ("s008", "s008", "s008")
    with pytest.raises(DataError, match=r"none of the 3 samples from index 11 on .*s011: checksum"):
        next(steps)


def test_truncation_is_counted(tmp_path: Path) -> None:
    write_shards([record(1, answer="clear " * 90), record(2)], tmp_path / "out")
    (batch,) = next(iter(loader(tmp_path / "out", global_batch=2, micro_batch=2)))
    assert batch.truncated == 1
    assert batch.input_ids.shape[1] == 64


def test_evaluation_uses_every_sample_once_in_order(shards: Path) -> None:
    index, left = ShardIndex.open(shards), collator(None, padding_side="left", with_answer=False)
    seen = list(batches(index, left, 4))
    assert [len(samples) for samples, _ in seen] == [4, 4, 4, 4, 4, 3]
    assert [s.key for samples, _ in seen for s in samples] == index.keys
    assert all(tuple(s.key for s in samples) == batch.keys for samples, batch in seen)
    chosen = list(batches(index, left, 2, np.array([7, 1, 4])))
    assert [batch.keys for _, batch in chosen] == [("s007", "s001"), ("s004",)]
    assert list(batches(index, left, 2, [])) == []


def test_evaluation_reports_skipped_samples(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(shards, 2, 21, 22)
    seen = list(batches(ShardIndex.open(shards), collator(), 5))
    assert sum(len(samples) for samples, _ in seen) == 20
    skipped = [reason.split(":")[0] for _, batch in seen for reason in batch.skipped]
    assert [name.rsplit("/")[-1] for name in skipped] == ["s002", "s021", "s022"]
    assert len(caplog.records) == 3


def test_jpeg_and_gray_reach_both_towers_as_rgb(tmp_path: Path) -> None:
    write_shards([Record("j", images(picture(1, 33, 20, "jpg")), record(1).fields)], tmp_path / "out")
    (got,) = [batch for _, batch in batches(ShardIndex.open(tmp_path / "out"), collator(), 1)]
    assert got.student_pixels.shape[1] == got.teacher_pixels.shape[1] == 3
    assert torch.isfinite(got.student_pixels).all()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_samples_are_used_once_with_any_number_of_ranks(shards: Path, world: int) -> None:
    """The micro-batches are those of one rank; a rank without any left gets a batch with weight 0."""
    index = ShardIndex.open(shards)
    ranks = [ValidationLoader(index, collator(), micro_batch=3, rank=rank, world=world) for rank in range(world)]
    whole = list(ValidationLoader(index, collator(), micro_batch=3))
    assert [key for batch in whole for key in batch.keys] == [index.read(i).key for i in range(len(index))]
    found = [list(rank) for rank in ranks]
    assert {len(rank) for rank in ranks} == {len(batches) for batches in found} == {-(-len(whole) // world)}
    dealt = [batch for turn in zip(*found, strict=True) for batch in turn]
    for one, two in zip(whole, dealt, strict=False):
        assert_same(one, two)
    assert all(batch.keys == () and batch.image_weight.sum() == 0 for batch in dealt[len(whole) :])
