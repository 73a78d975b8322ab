"""A configuration built in Python is checked like a recipe."""

from __future__ import annotations

import pytest

import medalign
from medalign import config
from medalign.config import Config, DataConfig, StudentConfig, TeacherConfig
from medalign.errors import ConfigError


@pytest.fixture
def settings(tmp_path) -> Config:
    built = Config(data=DataConfig(train="c"), teacher=TeacherConfig("b"), student=StudentConfig("a"))
    built.run.dir = str(tmp_path / "run")
    return built


def test_a_valid_configuration_is_returned_with_the_types_of_its_fields(settings):
    settings.train.lr = 1
    settings.optimizer.betas = (0, 0.5)
    checked = config.check(settings)
    assert checked == settings and checked is not settings
    assert type(checked.train.lr) is float and type(checked.train.batch_size) is int
    assert checked.optimizer.betas == (0.0, 0.5)


def test_a_loaded_recipe_is_valid():
    loaded = config.load("llava_vqa", ["--student.path", "a", "--teacher.path", "b", "--data.train", "c"])
    assert config.check(loaded) == loaded


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.lr", -1.0, r"^the Config: train\.lr is -1\.0; it must be >= 0$"),
        ("train.batch_size", 0, r"^the Config: train\.batch_size is 0; it must be > 0$"),
        ("train.batch_size", 2.5, r"^the Config: train\.batch_size is 2\.5; it must be a whole number$"),
        ("train.steps", "many", r"^the Config: train\.steps is many; it must be a whole number or null$"),
        ("student.layer", 0, r"^the Config: student\.layer is 0; it must be > 0 .the tapped block needs one before it"),
        ("student.lora.dropout", 1.0, r"^the Config: student\.lora\.dropout is 1\.0; it must be >= 0 and < 1$"),
        ("data.weights", [1.0, -1.0], r"^the Config: data\.weights is "),
        ("optimizer.betas", (0.9, 1.0), r"^the Config: optimizer\.betas is "),
        ("losses.impl", "magic", r"^the Config: losses\.impl is magic; it must be one of auto"),
        ("run.seed", 2**32, r"^the Config: run\.seed is 4294967296; it must be >= 0 and < 4294967296$"),
        ("train.stps", 5, r"^unknown key 'train\.stps' in the Config; the nearest known key is 'train\.steps'$"),
        ("train.epochs", 3.0, r"^train\.steps is 1000 and train\.epochs is 3\.0; set one of them$"),
        ("student.path", "", r"^student\.path is not set; "),
    ],
)
def test_training_refuses_an_invalid_setting_before_anything_is_written(settings, tmp_path, name, value, message):
    *sections, field = name.split(".")
    section = settings
    for part in sections:
        section = getattr(section, part)
    setattr(section, field, value)
    with pytest.raises(ConfigError, match=message):
        medalign.train(settings)
    assert not (tmp_path / "run").exists()
