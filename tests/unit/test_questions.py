"""A file of questions: which lines are read, and which are refused by number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medalign.data.samples.bad_sample import BadSample
from medalign.errors import DataError
from medalign.questions import QuestionFile


def write(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_lines_become_samples(tmp_path):
    for name in ("a", "b"):
        Image.new("L", (4, 6)).save(tmp_path / f"{name}.png")
    path = write(
        tmp_path,
        {"id": "1", "image": "a.png", "question": "<image>Large? "},
        "",
        {"id": "2", "images": ["a.png", "b.png"], "question": "Grown?", "answer": "no", "answer_type": "Closed"},
        {"id": "3", "image": None, "question": "Describe.", "task": "report", "report": "Clear."},
    )
    file = QuestionFile(path)
    assert (len(file), file.max_images, file.with_reference) == (3, 2, {"2", "3"})
    first, second, third = map(file.read, range(3))
    assert (first.key, first.question, first.task, len(first.images)) == ("1", "Large?", "vqa", 1)
    assert (second.answer, second.answer_type, len(second.images)) == ("no", "closed", 2)
    assert (third.answer, third.task, third.images) == ("Clear.", "report", ())
    lengths = file.lengths(np.arange(3))
    assert lengths[1] > lengths[0] > lengths[2] == len("Describe.")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ([1], "line 2: it is a JSON list; write an object"),
        ({"question": "q"}, "line 2: id is None; write a text"),
        ({"id": "2", "question": " "}, "line 2: question is ' '; write a text"),
        (
            {"id": "2", "question": "q", "image": None, "task": "caption"},
            "line 2: task is 'caption'; it must be 'vqa' or 'report'",
        ),
        ({"id": "2", "question": "q", "image": None, "task": ["vqa"]}, r"line 2: task is \['vqa'\]; it must be"),
        ({"id": "2", "question": "q", "image": None, "answer": 3}, "line 2: answer is 3; task vqa requires text"),
        ({"id": "2", "question": "q", "image": None, "answer": 0}, "line 2: answer is 0; task vqa requires text"),
        (
            {"id": "2", "question": "q", "image": None, "answer_type": "multi"},
            "line 2: answer_type is 'multi'; it must be 'closed'",
        ),
        (
            {"id": "2", "question": "q", "image_path": "a.png"},
            "line 2: no image is named; write null for a question wit",
        ),
        ({"id": "2", "question": "q", "image": ""}, "line 2: image is ''; write a path, or null"),
        ({"id": "2", "question": "q", "image": "nan"}, "line 2: image is 'nan'; write a path, or null"),
        ({"id": "2", "question": "q", "image": [4]}, "line 2: the paths of images must be texts"),
        ({"id": "2", "question": "<image>", "image": "a.png"}, "line 2: question is '<image>', which contains no text"),
        (
            {"id": "2", "question": "q", "image": None, "boxes": [[0, 0, 2, 2]]},
            "line 2: boxes are given, but there is no image",
        ),
        ('{"id": "2", "id": "3", "question": "q", "image": null}', "line 2: .*id.* twice"),
        ({"id": "2", "question": "<image><image>q", "image": "a.png"}, "line 2: the text contains 2 <image>"),
        ({"id": "1", "question": "q", "image": None}, "line 2: the id '1' occurs twice"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    with pytest.raises(DataError, match=f"questions.jsonl, {message}"):
        QuestionFile(write(tmp_path, {"id": "1", "question": "q", "image": None}, line))


def test_boxes_are_those_of_the_first_image(tmp_path):
    Image.new("L", (4, 6)).save(tmp_path / "a.png")
    rows = [
        {"id": str(i), "image": "a.png", "question": "q", "boxes": [[0, 1, 3, last]]} for i, last in enumerate((5, 9))
    ]
    file = QuestionFile(write(tmp_path, *rows))
    assert file.read(0).boxes == ((0, 1, 3, 5),)
    with pytest.raises(BadSample, match=r"questions.jsonl/1: box .* is outside the image of 4 x 6 pixels"):
        file.read(1)


def test_a_file_without_questions_is_an_error(tmp_path):
    with pytest.raises(DataError, match="has no line"):
        QuestionFile(write(tmp_path, ""))
    with pytest.raises(DataError, match="cannot be read"):
        QuestionFile(tmp_path / "lost.jsonl")


def test_an_image_that_cannot_be_read_is_one_bad_question(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    rows = [{"id": str(i), "image": name, "question": "q"} for i, name in enumerate(("lost.png", "text.png"))]
    file = QuestionFile(write(tmp_path, *rows))
    for i, reason in enumerate((r"questions.jsonl/0: lost.png: .*No such file", r"questions.jsonl/1: text.png: ")):
        with pytest.raises(BadSample, match=reason):
            file.read(i)
