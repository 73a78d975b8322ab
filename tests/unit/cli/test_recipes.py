"""`medalign recipes`, and the recipes in the help of `medalign train`."""

from __future__ import annotations

import pytest
import yaml

from medalign import config
from medalign.cli.main import main


def test_the_list_has_each_recipe_with_what_it_is(capsys):
    assert main(["recipes"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [tuple(line.split(maxsplit=1)) for line in lines] == [(n, config.summarize(n)) for n in config.recipes()]


def test_the_settings_of_a_recipe_build_the_same_recipe(capsys, tmp_path):
    assert main(["recipes", "ablations/language_only"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert yaml.safe_load(shown.read_text())["student"]["steering"] is False
    words = ["--student.path", "a", "--data.train", "c"]
    assert config.load(str(shown), words) == config.load("ablations/language_only", words)


def test_an_unknown_recipe_ends_with_status_2(capsys):
    assert main(["recipes", "llava_med/slke"]) == 2
    assert "error: unknown recipe 'llava_med/slke': did you mean llava_med/slake?" in capsys.readouterr().err


def test_the_help_of_train_lists_the_recipes_by_folder(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines if line.startswith("  ") and line.strip() in config.group_recipes()] == (
        config.group_recipes()
    )
