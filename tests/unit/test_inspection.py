"""`medalign inspect`: the same global batches for every number of ranks and workers; and a batch that is shown."""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from medalign.__main__ import main
from medalign.config import load
from medalign.data.order.order import GlobalOrder, StepPlan
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.writer import write_shards
from medalign.inspection import global_batches
from medalign.phantom.records import records
from tests.unit.teacher.towers.cases import CASES


class Keys:
    """An index that has only keys."""

    def key(self, number: int) -> str:
        return f"k{number}"


@settings(max_examples=10, deadline=None)
@given(
    size=st.integers(1, 300),
    batch=st.integers(1, 70),
    micro=st.integers(1, 8),
    world=st.sampled_from([1, 2, 3, 8, 64, 512]),
    workers=st.sampled_from([0, 1, 4]),
    skip=st.integers(0, 4),
)
def test_what_is_listed_is_what_the_loaders_draw(size, batch, micro, world, workers, skip) -> None:
    """`test_index_sampler.py` proves that the draws are the same for every division into ranks."""
    order, steps = GlobalOrder(size, 5), range(skip, skip + 3)
    got = list(global_batches(Keys(), order, StepPlan(batch, micro, world), workers, steps))  # type: ignore[arg-type]
    positions = order.take(skip * batch, len(steps) * batch).reshape(-1, batch)
    assert [step for step, _ in got] == list(steps)
    assert [keys for _, keys in got] == [[f"k{n}" for n in row] for row in positions.tolist()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    assert main(["phantom", "--output", str(folder), "--train", "12", "--val", "2"]) == 0
    return folder / "train"


def keys(capsys: pytest.CaptureFixture[str], data: Path, *words: str) -> list[str]:
    capsys.readouterr()
    assert main(["inspect", "phantom", "--data.train", str(data), "--keys", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_keys_on_the_command_line(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    lines = keys(capsys, data, "--steps", "7")
    assert [json.loads(line)["step"] for line in lines] == list(range(7))
    assert all(len(json.loads(line)["keys"]) == 32 for line in lines)
    assert keys(capsys, data, "--steps", "7", "--world-size", "3", "--workers", "4") == lines
    assert keys(capsys, data, "--steps", "7", "--world-size", "64", "--skip", "4") == lines[4:]
    assert keys(capsys, data, "--steps", "7", "--run.seed", "1") != lines
    index = ShardIndex.open(data)
    first = GlobalOrder(len(index), 0).take(0, 32)
    assert json.loads(lines[0])["keys"] == [index.key(n) for n in first]


def test_the_length_of_the_run_is_shown(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    samples = len(ShardIndex.open(data))
    words = ["inspect", "phantom", "--data.train", str(data), "--train.batch_size", "2", "--train.epochs", "2"]
    length = f"{samples} steps of 2 samples: 2 epochs of {samples} samples"
    capsys.readouterr()
    assert main([*words, "--keys"]) == 0
    shown = capsys.readouterr()
    assert length in shown.err and len(shown.out.splitlines()) == 1
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(f"step 0 in a run of {length}")
    assert main([*words, "--keys", "--data.weights", "[1]"]) == 2
    assert "folders mixed by weight have no common epoch; set train.steps" in capsys.readouterr().err


def test_mixtures_and_groups_on_the_command_line(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    folders = ["--data.train", json.dumps([str(data), str(data.parent / "val")]), "--data.weights", "[1, 3]"]
    mixed = keys(capsys, data, "--steps", "6", *folders, "--data.length_groups", "3")
    assert keys(capsys, data, "--steps", "6", *folders, "--data.length_groups", "3", "--world-size", "8") == mixed
    drawn = [key for line in mixed for key in json.loads(line)["keys"]]
    held_out = set(ShardIndex.open(data.parent / "val").keys)
    assert 0.6 < sum(key in held_out for key in drawn) / len(drawn) < 0.9  # three of four, by chance of 192


def test_a_recipe_without_models_can_be_listed(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    assert main(["inspect", "llava_vqa", "--keys", "--steps", "2", "--data.train", str(data)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_teacher_that_cannot_be_followed_is_reported(capsys, data: Path, tmp_path: Path) -> None:
    next(case for case in CASES if case.name == "transformers SigLIP (MedSigLIP)").write(tmp_path / "siglip")
    words = ["--teacher.path", str(tmp_path / "siglip"), "--teacher.attention", "rollout"]
    assert main(["inspect", "phantom", "--data.train", str(data), *words]) == 2
    assert "teacher.attention is rollout, but teacher" in capsys.readouterr().err


def test_a_batch_is_shown(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, monkeypatch) -> None:
    words = ["inspect", "phantom", "--data.train", str(data), "--train.batch_size", "3", "--step", "2"]
    assert main(words) == 0
    plain = capsys.readouterr().out
    drawn = GlobalOrder(len(ShardIndex.open(data)), 0).take(6, 3)
    assert all(f"{ShardIndex.open(data).key(n)}: " in plain for n in drawn)
    assert "padding" in plain and "«" in plain and "[image of 64 tokens]" in plain and "image 4-67" in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(words) == 0
    colored = capsys.readouterr().out
    assert "▀" in colored and "\x1b[1;32m" in colored
    assert main([*words, "--output", str(tmp_path / "batch.html")]) == 0
    page = (tmp_path / "batch.html").read_text()
    assert page.count("data:image/png;base64,") == 6  # three samples, two towers
    assert page.count('class="answer"') >= 3 and "http" not in page
    assert main([*words, "--output", str(tmp_path / "batch.png")]) == 0
    with Image.open(tmp_path / "batch.png") as picture:
        colors = {tuple(color) for _, color in picture.convert("RGB").getcolors(1 << 24) or []}
    assert (0x12, 0x80, 0x5C) in colors  # supervised tokens have this color


def test_every_format_gives_the_spans(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    drawn: list[str] = []
    real = ImageDraw.ImageDraw.text

    def text(self, place, words, **how):
        drawn.append(words)
        return real(self, place, words, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    words = ["inspect", "phantom", "--data.train", str(data), "--train.batch_size", "2"]
    assert main(words) == 0
    spans = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  template 0-")]
    assert main([*words, "--output", str(tmp_path / "new" / "deep" / "batch.png")]) == 0
    assert main([*words, "--output", str(tmp_path / "newer" / "batch.html")]) == 0
    page = html.unescape((tmp_path / "newer" / "batch.html").read_text())
    assert len(spans) == 2
    for line in spans:
        assert line in " ".join(drawn)
        assert line.replace("-", "\N{EN DASH}") in page


def test_what_is_cut_is_marked_in_every_format(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    drawn: list[str] = []
    real = ImageDraw.ImageDraw.text

    def text(self, place, words, **how):
        drawn.append(words)
        return real(self, place, words, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    words = ["inspect", "phantom", "--data.train", str(data), "--train.batch_size", "8", "--data.max_length"]
    assert main([*words, "400"]) == 0
    plain = capsys.readouterr().out
    rows = [line for line in plain.splitlines() if " supervised, " in line[20:]]
    lengths = {line.split(":")[0]: int(line.split()[1]) for line in rows}
    limit = sorted(lengths.values())[4]
    longest = max(lengths, key=lambda key: lengths[key])
    start = f"longest sample: {longest}, {lengths[longest]} tokens; data.max_length is"
    assert plain.splitlines()[2] == f"{start} 400, no sample is truncated" and "CUT OFF" not in plain
    assert main([*words, str(limit)]) == 0
    lines = capsys.readouterr().out.splitlines()
    note = "  CUT OFF: {} tokens of the answer, of {} tokens in total"
    cut = {key: note.format(n - limit, n) for key, n in lengths.items() if n > limit}
    assert 0 < len(cut) < len(lengths)
    remedy = (
        f"{start} {limit}, which truncates {len(cut)} of 8 samples; "
        f"--data.max_length {lengths[longest]} would truncate none of them"
    )
    assert lines[2] == remedy
    marked = {
        line.split(":")[0]: below for line, below in zip(lines, lines[1:], strict=False) if " supervised, " in line[20:]
    }
    assert {key: below for key, below in marked.items() if "CUT OFF" in below} == cut
    assert main([*words, str(limit), "--data.packing", "true", "--output", str(tmp_path / "batch.html")]) == 0
    page = html.unescape((tmp_path / "batch.html").read_text())
    assert main([*words, str(limit), "--output", str(tmp_path / "batch.png")]) == 0
    for line in (remedy, *cut.values()):
        assert line.strip() in page and line.strip() in drawn
    assert page.count('class="cut"') == len(cut)
    assert main([*words, "76"]) == 0
    assert "tokens of the question and " in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["html", "png"])
def test_an_output_that_cannot_be_written(data: Path, tmp_path: Path, ending: str, capsys) -> None:
    (tmp_path / "file").write_text("precious")
    words = ["inspect", "phantom", "--data.train", str(data), "--train.batch_size", "1", "--output"]
    assert main([*words, str(tmp_path / "file" / f"batch.{ending}")]) == 2
    assert f"file/batch.{ending} cannot be written: " in capsys.readouterr().err


def test_a_student_of_another_family(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packaged = Path(load("phantom", ["--data.train", str(data)], models=False).student.path)
    for name, settings_ in (("llama", {"model_type": "llama"}), ("none", {}), ("vit", {"model_type": "vit"})):
        shutil.copytree(packaged, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(settings_))
    (tmp_path / "vit" / "config.json").write_text("{broken")
    words = ["inspect", "phantom", "--data.train", str(data), "--student.path"]
    for name, message in (
        ("llama", "student model type 'llama' is not supported; supported: "),
        ("none", "cannot be read as a model: its config.json has no model_type"),
        ("vit", "student.path"),
    ):
        assert main([*words, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_a_packed_batch_is_shown_sample_by_sample(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    words = ["inspect", "phantom", "--data.train", str(data), "--train.batch_size", "5"]
    assert main(words) == 0
    padded = capsys.readouterr().out.splitlines()
    assert main([*words, "--data.packing", "true"]) == 0
    packed = capsys.readouterr().out.splitlines()
    without = [line.rsplit(", ", 1)[0] if line.endswith(" padding") else line for line in padded[2:]]
    assert [line.removesuffix(", 0 padding") for line in packed[2:]] == without
    assert not padded[1].endswith("padding 0.0 %") and packed[1].endswith("padding 0.0 %")


def test_all_images_of_a_sample_are_shown(data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    first, *others = [record for record in records(3, 0, "train") if record.fields["task"] == "report"]
    both = tuple(record.images[0] for record in others)
    write_shards([replace(first, images=first.images + both)], tmp_path / "three")
    short = ["inspect", "phantom", "--data.train", str(tmp_path / "three"), "--train.batch_size", "1"]
    words = [*short, "--data.max_length", "400"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("[image of 64 tokens]") == 3
    assert shown.count("▀") == 6 * 28 * 14  # characters of the six pictures: three images, two towers
    assert max(line.count("▀") for line in shown.splitlines()) == 4 * 28
    assert main([*words, "--output", str(tmp_path / "batch.html")]) == 0
    assert (tmp_path / "batch.html").read_text().count("data:image/png;base64,") == 6
    assert main([*words, "--output", str(tmp_path / "batch.png")]) == 0
    with Image.open(tmp_path / "batch.png") as picture:
        assert picture.height > 2 * 160  # two lines of pictures
        page = np.asarray(picture.convert("L"))
    thumbs = [page[72 + y : 232 + y, 12 + x : 172 + x] for y in (0, 168) for x in range(0, 4 * 168, 168)]
    assert [thumb.std() > 10 for thumb in thumbs] == [True] * 6 + [False] * 2
    assert main(short) == 2
    assert "the 3 images of the largest sample with 64 tokens each take 201; raise it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keys"], "the recipe is missing"),
        (["phantom", "--keys"], "data.train is not set"),
        (["phantom", "--data.train", "nowhere", "--keys"], "does not exist"),
        (["phantom", "--data.train", "DATA", "--keys", "--steps", "3", "--skip", "3"], "raise --steps"),
        (["phantom", "--data.train", "DATA", "--nothing", "1"], "unknown key 'nothing'"),
        (["phantom", "--data.train", "DATA", "--output", "x.pdf"], r".html or .png"),
        (["phantom", "--data.train", "DATA", "--skip", "0"], "--skip applies to a list of keys; add --keys"),
        (
            ["phantom", "--data.train", "DATA", "--world-size", "2"],
            "--world-size applies to a list of keys; add --keys",
        ),
        (["phantom", "--data.train", "DATA", "--workers", "0"], "--workers applies to a list of keys; add --keys"),
        (["phantom", "--data.train", "DATA", "--steps", "1"], "--steps applies to a list of keys; add --keys"),
        (
            ["phantom", "--data.train", "DATA", "--keys", "--output", "x.png"],
            "--output applies to a batch that is shown",
        ),
        (["phantom", "--data.train", "DATA", "--keys", "--step", "1"], "--step applies to a batch that is shown"),
    ],
)
def test_errors_give_the_remedy(words: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *(str(data) if word == "DATA" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keys", "--world-size", "0"], "argument --world-size: '0' is not a whole number of at least 1"),
        (["--keys", "--steps", "many"], "argument --steps: 'many' is not a whole number of at least 0"),
        (["--step", "-1"], "argument --step: '-1' is not a whole number of at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "phantom", *words])
    assert message in capsys.readouterr().err


def test_index_of_tars_from_other_tools(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for tar in data.glob("*.tar"):
        (folder / tar.name).write_bytes(tar.read_bytes())
    assert main(["shards", "index", str(folder)]) == 0
    assert (folder / "index.jsonl").read_bytes() == (data / "index.jsonl").read_bytes()
    assert main(["shards", "index", str(tmp_path)]) == 2
    assert "contains no .tar file" in capsys.readouterr().err
