"""Recipes that build on one another."""

from __future__ import annotations

import pytest

from medalign import config
from medalign.errors import ConfigError

NEEDED = "student: {path: a}\nteacher: {path: b}\ndata: {train: [c]}\n"


@pytest.fixture
def write(tmp_path):
    """A function that writes a recipe into a temporary folder and returns its path."""

    def act(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return act


def test_the_child_s_settings_win_key_by_key(write):
    write("base.yaml", NEEDED + "losses: {alpha: 2.0, beta: 3.0}\nrun: {seed: 1}\n")
    settings = config.load(write("child.yaml", "base: base.yaml\nlosses: {beta: 4.0}\n"), ["--run.seed", "5"])
    assert (settings.losses.alpha, settings.losses.beta, settings.run.seed) == (2.0, 4.0, 5)
    assert settings.data.train == ["c"]


def test_a_base_is_a_packaged_recipe_or_relative_to_the_file_and_may_have_one_itself(write):
    write("shared/middle.yaml", "base: phantom\ndata: {train: [c]}\ntrain: {lr: 0.5}\n")
    settings = config.load(write("mine/child.yaml", "base: ../shared/middle.yaml\nrun: {seed: 3}\n"))
    assert settings == config.load("phantom", ["--data.train", '["c"]', "--train.lr", "0.5", "--run.seed", "3"])


def test_of_several_bases_the_later_ones_win_and_the_child_s_settings_win_over_all(write):
    write("student.yaml", NEEDED + "losses: {alpha: 2.0, beta: 3.0}\ntrain: {epochs: 9}\n")
    write("data.yaml", "losses: {beta: 4.0}\ntrain: {steps: 7}\nrun: {seed: 1}\n")
    settings = config.load(write("child.yaml", "base: [student.yaml, data.yaml, parts/slake]\nrun: {seed: 2}\n"))
    assert (settings.losses.alpha, settings.losses.beta, settings.run.seed) == (0.1, 0.06, 2)
    settings = config.load(write("child.yaml", "base: [student.yaml, data.yaml]\n"))
    assert (settings.losses.alpha, settings.losses.beta, settings.run.seed) == (2.0, 4.0, 1)
    assert (settings.train.steps, settings.train.epochs) == (7, None)


@pytest.mark.parametrize(
    ("base", "child", "decides"),
    [
        ("epochs: 9", "steps: 7", (7, None)),
        ("steps: 7", "epochs: 9", (None, 9.0)),
        ("epochs: 9", "lr: 0.5", (None, 9.0)),
        ("epochs: 9", "{steps: 7, epochs: null}", (7, None)),
    ],
)
def test_the_child_s_length_replaces_that_of_its_base(write, base, child, decides):
    write("base.yaml", NEEDED + f"train:\n  {base}\n")
    settings = config.load(write("child.yaml", f"base: base.yaml\ntrain:\n  {child}\n"))
    assert (settings.train.steps, settings.train.epochs) == decides


def test_the_dump_names_no_base(write, tmp_path):
    settings = config.load(write("child.yaml", "base: phantom\ndata: {train: c}\n"))
    assert "base:" not in config.dump(settings)
    assert config.read(tmp_path / write("config.yaml", config.dump(settings))) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "base: missing.yaml",
            r"unknown recipe '.*missing\.yaml' \(the base of .*child\.yaml\): there is no such file",
        ),
        ("base: phantm", r"unknown recipe '.*phantm' \(the base of .*child\.yaml\): did you mean phantom\?"),
        (
            "base: 3",
            r"recipe .*child\.yaml: base is 3; it must be a packaged recipe, the path of a YAML file, or a list",
        ),
        ("base: [phantom, 3]", r"recipe .*child\.yaml: base is \['phantom', 3\]; it must be a packaged recipe"),
        ("base: [phantom, child.yaml]", r"cycle: .*child\.yaml -> .*child\.yaml; remove one base"),
        ("base: child.yaml", r"cycle: .*child\.yaml -> .*child\.yaml; remove one base"),
        ("base: other.yaml", r"cycle: .*child\.yaml -> .*other\.yaml -> .*child\.yaml"),
        ("base: wrong.yaml", r"unknown key 'train\.stps' in recipe .*wrong\.yaml; the nearest known key"),
    ],
)
def test_a_base_that_cannot_be_used_is_named(write, text, message):
    write("other.yaml", "base: child.yaml")
    write("wrong.yaml", "train: {stps: 1}")
    with pytest.raises(ConfigError, match=message):
        config.load(write("child.yaml", text))
