"""Present and earlier names of settings."""

from __future__ import annotations

import pytest

from medalign import config
from medalign.config.keys import OLD_NAMES, all_keys, flatten, nest
from medalign.errors import ConfigError


def test_old_names_lead_to_present_ones():
    known = set(all_keys())
    assert set(OLD_NAMES.values()) <= known and not known & set(OLD_NAMES)


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_an_old_name_is_an_error_that_names_the_new_one(tmp_path, old, new):
    with pytest.raises(ConfigError, match=rf"'{old}' in the command line is now called '{new}'"):
        config.load("phantom", ["--data.train", "c", f"--{old}", "1"])
    section, name = old.split(".")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{section}: {{{name}: 1}}\n")
    with pytest.raises(ConfigError, match=rf"'{old}' in recipe .*recipe\.yaml is now called '{new}'"):
        config.load(str(path))


def test_the_settings_of_a_run_with_an_old_name_are_refused(tmp_path):
    path = tmp_path / "config.yaml"
    written = config.dump(config.load("phantom", ["--data.train", "c"]))
    path.write_text(written.replace("max_grad_norm:", "clip:"))
    with pytest.raises(ConfigError, match=r"'train\.clip' .* 'train\.max_grad_norm'"):
        config.read(path)


def test_nest_is_the_inverse_of_flatten():
    values = {"a": {"b": {"c": 1}, "d": [2]}, "e": None}
    assert flatten(values) == {"a.b.c": 1, "a.d": [2], "e": None}
    assert nest(flatten(values)) == values
