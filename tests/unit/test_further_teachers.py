"""Several teachers: the list of sections is read, checked and written, and each teacher has its own losses."""

from __future__ import annotations

import pytest
import torch
import yaml

from medalign import config
from medalign.config import FurtherTeacher, LossConfig, TeacherSettings
from medalign.contracts import StudentOutput, TeacherTargets
from medalign.errors import ConfigError
from medalign.losses import Objective, build_terms
from medalign.teacher.loading import require_attention
from tests import tiny

WORDS = ["--student.path", "a", "--teacher.path", "b", "--data.train", "c"]


def load(also: str, *words: str) -> config.Config:
    return config.load("llava_vqa", [*WORDS, "--teacher.also", also, *words])


def test_a_list_of_teachers_is_read_checked_and_written(tmp_path):
    found = load("[{path: x, similarity_weight: 1, name: biovil, mean: [0.1, 0, 0.3]}, {path: y}]")
    first, second = found.teacher.also
    assert first == FurtherTeacher("x", similarity_weight=1.0, name="biovil", mean=(0.1, 0.0, 0.3))
    assert type(first.similarity_weight) is float and second == FurtherTeacher("y")
    assert [each.path for each in found.teachers] == ["b", "x", "y"]
    (tmp_path / "config.yaml").write_text(config.dump(found))
    assert config.read(tmp_path / "config.yaml") == config.check(found) == found
    values = yaml.safe_load(config.dump(found))
    assert values["teacher"]["also"][0]["name"] == "biovil"


@pytest.mark.parametrize(
    ("also", "words", "message"),
    [
        ("[{path: x, alpha: 1}]", [], "unknown key 'alpha' in an item of teacher.also; it can have path, mean"),
        ("[{path: x, similarity_weight: -1}]", [], r"teacher\.also\.similarity_weight is -1; it must be >= 0"),
        (
            "[{path: x, features: all}]",
            [],
            r"teacher\.also\.features is all; it must be one of after_norm",
        ),
        ("[x]", [], r"each item of teacher\.also must be a section of settings such as \{path: \.\.\.\}"),
        ("x", [], r"teacher\.also is x; it must be a list, each item a section"),
        ("[{name: x}]", [], r"teacher\.also: teacher 2 has no path"),
        ("[{path: x, name: a/b}]", [], "must consist of letters"),
        ("[{path: x}, {path: y, name: '2'}]", [], "several teachers are named 2"),
        ("[{path: x}]", ["--losses.alpha", "0", "--losses.beta", "0"], r"teacher\.also has 1 teachers, but losses\."),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(also, words, message):
    with pytest.raises(ConfigError, match=message):
        load(also, *words)


def test_each_teacher_has_its_terms():
    """The total is the sum of both teachers' losses, each with its own targets and weights."""
    teachers = [
        TeacherSettings("a", similarity_weight=0.5),
        FurtherTeacher("b", name="other", similarity_weight=2.0, attention_weight=0.0),
    ]
    batch, draw = tiny.batch(), torch.Generator().manual_seed(0)
    tokens, attention = torch.randn(2, 16, 8, generator=draw), torch.rand(2, 16, generator=draw)
    targets = [torch.randn(2, 16, width, generator=draw) for width in (6, 5)]
    length = batch.input_ids.shape[1]
    output = StudentOutput(torch.zeros(2, length, 256), torch.arange(length), tokens, attention)
    given = TeacherTargets(targets[0], torch.rand(2, 16, generator=draw), also=(TeacherTargets(targets[1], None),))
    objective = Objective(build_terms(LossConfig(alpha=1.0, beta=0.3), teachers))
    names = ["language", "similarity", "attention", "similarity_other", "attention_other"]
    assert objective.coefficients == dict(zip(names, [1.0, 0.5, 0.3, 2.0, 0.0], strict=True))
    report = objective(output, given, batch, dict.fromkeys(names, 1.0))
    assert list(report.terms) == names[:4]  # the second teacher has no attention
    for name, own in (("similarity", given), ("similarity_other", given.also[0])):
        alone = Objective(build_terms(LossConfig(beta=0.0)))(output, own, batch, dict.fromkeys(names, 1.0))
        assert torch.equal(report.terms[name].sum, alone.terms["similarity"].sum)
    parts = {name: report.terms[name].sum for name in names[:4]}
    expected = parts["language"] + 0.5 * parts["similarity"] + 0.3 * parts["attention"] + 2 * parts["similarity_other"]
    torch.testing.assert_close(report.total, expected)


def test_a_further_teacher_without_attention_needs_the_weight_zero(teacher_folder, tmp_path):
    also = f"[{{path: 'biovil:{tmp_path / 'x.pt'}', attention_weight: WEIGHT}}]"
    words = ["--teacher.path", str(teacher_folder)]
    with pytest.raises(ConfigError, match=r"its attention_weight is 1\.0, but teacher biovil:.*; set it to 0"):
        require_attention(load(also.replace("WEIGHT", "1"), *words))
    require_attention(load(also.replace("WEIGHT", "0"), *words))
