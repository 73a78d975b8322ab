"""A question on the command line is read like one in the training data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from medalign import inference
from medalign.__main__ import main
from medalign.contracts import Sample


class Opened(Exception):
    """Raised in place of generating an answer."""


@pytest.fixture
def film(tmp_path: Path) -> Path:
    Image.new("L", (8, 8)).save(tmp_path / "film.png")
    return tmp_path / "film.png"


@pytest.mark.parametrize("question", ["<image> is it?", "is it?<image>", "<image>\nis it? ", " is it?"])
def test_the_image_tag_is_removed_as_in_training(monkeypatch, tmp_path: Path, film: Path, question: str) -> None:
    asked: list[Sample] = []

    def collator(samples: list[Sample]) -> None:
        asked.extend(samples)
        raise Opened

    opened = SimpleNamespace(), None, collator
    monkeypatch.setattr(inference, "open_student", lambda *_, **__: opened)
    with pytest.raises(Opened):
        inference.generate(tmp_path, [film], question)
    assert [sample.question for sample in asked] == ["is it?"]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("<image> or <image>?", "--question: the text contains 2 <image>, but the sample has 1 image"),
        ("<|image_1|> is it?", "--question: the text contains '<|image_1|>'"),
        ("est-ce l'\udce9paule?", r"--question is not text in UTF-8: '\udce9' after 9 characters; set the terminal"),
        ("a\0b", "--question: the text contains the character NUL"),
        (" <image> ", "--question is empty"),
        ("", "--question is empty"),
    ],
)
def test_a_question_that_cannot_be_used_is_refused(
    tmp_path: Path, film: Path, capsys, question: str, message: str
) -> None:
    assert main(["generate", str(tmp_path), "--image", str(film), "--question", question]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_folder_is_not_an_image(tmp_path: Path, capsys) -> None:
    assert main(["generate", str(tmp_path), "--image", str(tmp_path), "--question", "is it?"]) == 2
    assert f"--image {tmp_path} is a folder; name a file" in capsys.readouterr().err
