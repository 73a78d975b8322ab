"""Targets from a cache equal those of the tower; what does not belong to a run is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from medalign import assembly, pipeline, target_cache
from medalign import config as settings
from medalign.cli.main import main
from medalign.config import Config, FurtherTeacher
from medalign.contracts import Batch
from medalign.data.shards.writer import write_shards
from medalign.errors import ConfigError, DataError
from medalign.losses import build_objective
from medalign.phantom.records import records
from medalign.student.checks import check_student
from medalign.student.loading import load_student
from medalign.teacher.cache import files
from medalign.teacher.lexicon import PACKAGED
from medalign.teacher.loading import load_teacher, read_preprocess_cfg
from medalign.teacher.model import Teacher
from medalign.teacher.targets import teacher_targets
from tests import tiny
from tests.unit.teacher.towers.test_texts import PHANTOM

HALF = 2**-11  # largest relative error of a number in float16
COSINE = 2 * HALF  # of a cosine of two rounded vectors: each turns by at most HALF


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    whole = list(records(6, 0, "train"))
    assert write_shards(whole[:-4], folder / "train").refused == ()
    assert write_shards(whole[-4:], folder / "other").refused == ()
    return folder


@pytest.fixture(scope="module")
def make(shards, student_folder, teacher_folder):
    """Settings of a run with the cache in a folder."""

    def config(cache: Path | str, *words: str) -> Config:
        own = ["--student.path", str(student_folder), "--student.layer", "2", "--teacher.path", str(teacher_folder)]
        own += ["--data.train", str(shards / "train"), "--data.max_length", "220", "--train.micro_batch_size", "4"]
        return settings.load("phantom", [*own, "--teacher.cache", str(cache), *words])

    return config


@pytest.fixture(scope="module")
def cache(make, tmp_path_factory):
    """A cache of the phantom teacher with its prompts."""
    folder = tmp_path_factory.mktemp("caches") / "phantom"
    target_cache.write(make(folder, "--teacher.path", str(PHANTOM), "--teacher.text_weight", "1"))
    return folder


def first_batch(config: Config) -> Batch:
    """The first micro-batch of a run, read as in training; the cache is checked as at its start."""
    index = pipeline.open_index(config)
    collator, processor = pipeline.check_collator(config, None, index.max_images)
    target_cache.check(config, collator, [index, None])
    (teacher,) = assembly.build_teachers(config)
    collator = pipeline.build_collator(config, check_student(config.student)[0], processor, teacher.view, 1)
    return next(iter(pipeline.build_loader(config, index, collator, 0)))[0]


def losses_and_gradient(config: Config) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Each loss of the first micro-batch, and the gradient of each on W."""
    batch = first_batch(config)
    (teacher,) = assembly.build_teachers(config)
    student = load_student(config.student, torch.float32).train()
    torch.nn.init.normal_(student.steering.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    targets = teacher_targets(teacher, batch.teachers[0], student.spec.grid, batch.image_questions)
    report = build_objective(config)(student(batch), targets, batch, {"language": 1, "similarity": 1, "attention": 1})
    means = {name: float(term.sum.detach() / term.count) for name, term in report.terms.items()}
    gradients = {
        name: torch.autograd.grad(report.terms[name].sum, student.steering.weight, retain_graph=True)[0]
        for name in ("similarity", "attention")
    }
    return means, gradients


@pytest.mark.parametrize("words", [[], ["--teacher.text_weight", "0.5", "--teacher.mask_sinks", "1.5"]])
def test_losses_and_gradients_equal_those_of_the_tower(make, cache, words, monkeypatch):
    """Features are rounded to float16, everything else is kept in float32.

    A loss L is the mean square of differences of cosines with those of the student. If each cosine of the teacher
    changes by at most c, then L changes by at most 2 c sqrt(L) + c^2, and the gradient by c / sqrt(L) of itself where
    errors and gradients do not cancel. The other losses differ by roundings of float32, because the tower ran on other
    batches.
    """
    words = ["--teacher.path", str(PHANTOM), *words]
    online, expected = losses_and_gradient(make("", *words))
    monkeypatch.setattr(assembly, "load_tower", None)  # no weights are loaded
    found, gradients = losses_and_gradient(make(cache, *words))
    assert found["language"] == online["language"]
    assert found["attention"] == pytest.approx(online["attention"], rel=1e-5)
    loss = online["similarity"]
    assert 0 < abs(found["similarity"] - loss) <= 2 * COSINE * loss**0.5 + COSINE**2
    for name, bound in {"similarity": COSINE / loss**0.5, "attention": 1e-4}.items():
        difference = torch.linalg.vector_norm(gradients[name] - expected[name])
        assert difference <= bound * torch.linalg.vector_norm(expected[name])


@pytest.mark.parametrize("weighting", ["uniform", "teacher_attention"])
def test_a_batch_without_images_has_losses_of_zero(make, cache, weighting):
    words = ["--teacher.text_weight", "0.5", "--teacher.mask_sinks", "2", "--losses.weighting", weighting]
    config = make(cache, "--teacher.path", str(PHANTOM), *words)
    (teacher,) = assembly.build_teachers(config)
    batch = tiny.batch(images=False)
    inputs = {name: tensor[None] for name, tensor in teacher.view.blank().items()}
    student = load_student(config.student, torch.float32).train()
    targets = teacher_targets(teacher, inputs, student.spec.grid, ("",))
    names = ("language", "similarity", "attention")
    report = build_objective(config)(student(batch), targets, batch, dict.fromkeys(names, 1.0))
    report.total.backward()
    assert float(report.terms["similarity"].sum) == float(report.terms["attention"].sum) == 0
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher.mean", "[0.5, 0.5, 0.4]"], r"geometry\.mean is .*0\.4"),
        (["--teacher.features", "before_norm"], r"teacher\.features is after_norm, but it is before_norm now"),
        (["--teacher.precision", "bf16"], r"teacher\.precision is fp32, but it is bf16 now"),
        (["--teacher.random_weights_seed", "1"], r"teacher\.weights is \w{12}\.\.\., but it is random, seed 1 now"),
        (["--teacher.path", "TINY"], r"teacher\.configuration is"),
        (["--data.train", "OTHER"], r"does not hold the targets of all images of the shards with 4 samples"),
        (["--teacher.cache", "EMPTY"], r"EMPTY holds no targets .* medalign targets"),
        (["--teacher.text_weight", "1", "--teacher.lexicon", "LEXICON"], r"its prompts is"),
    ],
)
def test_what_does_not_belong_to_the_run_is_refused_before_it_starts(
    make, cache, shards, teacher_folder, tmp_path, words, message
):
    lexicon = tmp_path / "lexicon.yaml"
    lexicon.write_text("findings: {mass: {words: [mass], present: [a mass], absent: [no mass]}}")
    places = {"TINY": teacher_folder, "OTHER": shards / "other", "EMPTY": tmp_path / "EMPTY", "LEXICON": lexicon}
    words = [str(places.get(word, word)) for word in words]
    with pytest.raises(ConfigError, match=message):
        first_batch(make(cache, "--teacher.path", str(PHANTOM), *words))


def test_a_lexicon_in_another_order_is_another_one(make, cache, tmp_path):
    """The cache has the relevance of each finding by its place in the lexicon."""
    content = yaml.safe_load(PACKAGED.read_text())
    lexicon = tmp_path / "lexicon.yaml"
    words = ["--teacher.path", str(PHANTOM), "--teacher.text_weight", "1", "--teacher.lexicon", str(lexicon)]
    lexicon.write_text(yaml.safe_dump(content, sort_keys=False))
    first_batch(make(cache, *words))
    content["findings"] = dict(reversed(content["findings"].items()))
    lexicon.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ConfigError, match="its prompts is"):
        first_batch(make(cache, *words))


def test_other_weights_and_targets_without_text_are_refused(make, tmp_path):
    teacher = tiny.save_teacher(tmp_path / "teacher")
    config = make(tmp_path / "cache", "--teacher.path", str(teacher))
    target_cache.write(config)
    first_batch(config)
    config.teacher.text_weight = 0.5
    with pytest.raises(ConfigError, match="made without text-conditioned targets"):
        first_batch(config)
    config.teacher.text_weight = 0.0
    tiny.save_teacher(teacher, seed=1)
    with pytest.raises(ConfigError, match=r"its teacher\.weights is"):
        first_batch(config)
    with pytest.raises(ConfigError, match=r"its teacher\.weights is"):
        target_cache.write(config)


def test_a_missing_and_a_damaged_entry_are_named(make, tmp_path):
    config = make(tmp_path / "cache")
    target_cache.write(config)
    (part,) = (tmp_path / "cache").glob("part-*")
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"part-.* cannot be read .* run medalign targets again"):
        first_batch(config)
    part.unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar/\S+: teacher\.cache .* no targets for an image of this"):
        first_batch(config)
    target_cache.write(config)
    assert first_batch(config).teachers[0].keys() == {"features", "attention"}


def test_an_interrupted_command_continues_and_ranks_share_the_work(make, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_FLUSH_BYTES", 1)  # a file for each batch
    config = make(tmp_path / "cache")
    observe, calls = Teacher.observe, []

    def stop_at_second(teacher, inputs):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(len(inputs["pixels"]))
        return observe(teacher, inputs)

    monkeypatch.setattr(Teacher, "observe", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        target_cache.write(config)
    monkeypatch.setattr(Teacher, "observe", observe)
    before = len(files.CacheFiles(tmp_path / "cache"))
    assert before == calls[0] > 0
    (tmp_path / "cache" / "part-00000-torn.partial").write_bytes(b"torn")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(ConfigError, match="does not hold the targets of all images"):
            first_batch(config)
        target_cache.write(config)
    assert not list((tmp_path / "cache").glob("*.partial"))
    monkeypatch.undo()
    stored = files.CacheFiles(tmp_path / "cache")
    index = pipeline.open_index(config)
    assert before < len(stored) <= index.image_count
    first_batch(config)
    sizes = len(list((tmp_path / "cache").iterdir()))
    target_cache.write(config)  # adds nothing
    assert len(files.CacheFiles(tmp_path / "cache")) == len(stored)
    assert len(list((tmp_path / "cache").iterdir())) == sizes + 1  # this number of ranks covers the shards too


def test_the_command_says_what_the_targets_take_and_several_teachers_have_their_own(make, tmp_path, capsys):
    config = make(tmp_path / "first")
    config.teacher.also = [FurtherTeacher(path=str(PHANTOM), cache=str(tmp_path / "second"))]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(settings.dump(config))
    assert main(["targets", str(recipe)]) == 0
    text = capsys.readouterr().err
    # 36 patches: 24 features of 2 bytes, attention and norm of 4 each; 16 bytes of the hash.
    assert f"{(36 * (24 * 2 + 8) + 16) / 1e3:.1f} kB per image, at most" in text
    for folder in ("first", "second"):
        stored = files.CacheFiles(tmp_path / folder)
        content = json.loads((tmp_path / folder / "targets.json").read_text())
        assert len(stored) > 0 and content["geometry"]["decoded_for"] == 96
    assert main(["targets", str(recipe), "--teacher.cache", "", "--teacher.also", "[]"]) == 2
    assert "teacher.cache is not set" in capsys.readouterr().err
    off = ["--losses.alpha", "0", "--losses.beta", "0", "--teacher.also", "[]"]
    assert main(["targets", str(recipe), *off]) == 2
    assert "losses.alpha and losses.beta are 0, so no teacher is loaded" in capsys.readouterr().err


def test_images_are_decoded_for_teachers_without_a_cache_too(make, tmp_path):
    """A JPEG is decoded at a fraction of its size that still covers the largest tower, here one without a cache."""
    tall = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 300, 3), dtype=np.uint8))
    (tmp_path / "in").mkdir()
    tall.save(tmp_path / "in" / "film.jpg")
    row = {
        "id": "a",
        "image": "film.jpg",
        "task": "vqa",
        "question": "Is it?",
        "answer": "yes",
        "answer_type": "closed",
    }
    (tmp_path / "in" / "annotations.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["shards", "jsonl", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "shards")]) == 0
    config = make(tmp_path / "cache", "--data.train", str(tmp_path / "shards" / "train"), "--train.batch_size", "4")
    config.teacher.also = [FurtherTeacher(path=str(PHANTOM))]
    index = pipeline.open_index(config)
    sizes = {read_preprocess_cfg(each.path).size for each in config.teachers}
    assert index.read(0, min(sizes)).images[0].size != index.read(0, max(sizes)).images[0].size
    target_cache.write(config)
    collator, processor = pipeline.check_collator(config, None, index.max_images)
    target_cache.check(config, collator, [index, None])
    first, *also = (each.view for each in assembly.build_teachers(config))
    collator = pipeline.build_collator(config, check_student(config.student)[0], processor, first, 1, also)
    batch = next(iter(pipeline.build_loader(config, index, collator, 0)))[0]  # every image has its targets
    assert len(batch.teachers) == 2 and batch.skipped == ()


def test_features_beyond_float16_are_refused(tmp_path):
    writer = files.CacheWriter(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"not within the range of float16.* after_norm"):
        writer.add([bytes(16)], {"features": torch.full((1, 2, 2), 1e5)})


def test_targets_without_a_cache_are_those_of_the_public_function(make, teacher_folder):
    """The loader's batch gives the same targets as `teacher_targets` with plain pixels."""
    config = make("")
    batch, teacher = first_batch(config), load_teacher(teacher_folder)
    assert batch.teacher_inputs is None
    expected = teacher_targets(teacher, batch.teacher_pixels, teacher.grid)
    found = teacher_targets(teacher, batch.teachers[0], teacher.grid)
    assert torch.equal(found.features, expected.features) and torch.equal(found.attention, expected.attention)
