"""A loss term from outside the package joins the objective, by the API and by settings."""

from __future__ import annotations

import pytest

from medalign import config
from medalign.config import Config
from medalign.errors import ConfigError
from medalign.losses import LanguageTerm, LossTerm, Objective, build_objective, build_terms
from tests.own_loss import COEFFICIENT, ZLoss
from tests.unit.losses.test_objective import ONE, batch, values


def named(*extra: str) -> Config:
    settings = Config()
    settings.student.path = "student"
    settings.losses.extra = list(extra)
    return settings


def test_an_own_term_is_counted_reported_and_added():
    leaves, output, targets = values()
    paper = build_terms(Config().losses)
    objective = Objective([*paper, ZLoss()])
    assert list(objective.counts(batch())) == list(objective.coefficients) == [*ONE, "z_loss"]
    assert objective.counts(batch())["z_loss"] == 5
    report = objective(output, targets, batch(), {**ONE, "z_loss": 0.5})
    without = Objective(paper)(output, targets, batch(), ONE)
    value = report.terms["z_loss"].sum
    expected = sum(output.logits[0, place].logsumexp(-1).square() for place in (0, 1, 2))
    expected = expected + sum(output.logits[1, place].logsumexp(-1).square() for place in (1, 2))
    assert float(value.detach()) == pytest.approx(float(expected.detach()))
    assert float(report.total.detach()) == pytest.approx(float((without.total + COEFFICIENT * 0.5 * value).detach()))
    value.backward()
    assert leaves["logits"].grad.abs().max() > 0


def test_an_own_term_is_set_by_its_import_path():
    objective = build_objective(named("tests.own_loss.z_loss"))
    assert objective.coefficients == {"language": 1.0, "similarity": 1.0, "attention": 0.06, "z_loss": COEFFICIENT}
    words = ["--student.path", "a", "--teacher.path", "b", "--data.train", "c"]
    loaded = config.load("phantom", [*words, "--losses.extra", "[tests.own_loss.z_loss]"])
    assert loaded.losses.extra == ["tests.own_loss.z_loss"]


def test_an_own_term_may_need_the_teacher_if_the_paper_s_terms_do_not():
    settings = named("tests.own_loss.z_loss")
    settings.losses.alpha = settings.losses.beta = 0.0
    assert not settings.distils
    settings.teacher.path = "teacher"
    assert settings.distils


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("z_loss", "is not an import path"),
        ("no_such_package.z_loss", "cannot be imported: No module named 'no_such_package'"),
        ("tests.own_loss.zloss", "cannot be imported: module 'tests.own_loss' has no attribute 'zloss'"),
        ("tests.own_loss.COEFFICIENT", "is not callable"),
        ("tests.own_loss.not_a_term", "returned int; it must return a medalign.losses.LossTerm"),
    ],
)
def test_a_path_that_does_not_give_a_term_is_refused(path, message):
    with pytest.raises(ConfigError, match=f"losses.extra '{path}' {message}"):
        build_objective(named(path))


def test_names_are_unique_and_total_is_reserved():
    with pytest.raises(ConfigError, match="several loss terms are named z_loss"):
        build_objective(named("tests.own_loss.z_loss", "tests.own_loss.z_loss"))
    with pytest.raises(ValueError, match="'total': the name is reserved"):
        type("Total", (ZLoss,), {"__init__": lambda self: LossTerm.__init__(self, "total", 1.0)})()
    with pytest.raises(ValueError, match="all coefficients of the loss terms are 0"):
        Objective([LanguageTerm(0.0)])
