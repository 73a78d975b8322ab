"""Recipes, overrides, and error messages for invalid settings."""

from __future__ import annotations

import pytest

from medalign import config
from medalign.config import value_types
from medalign.config.value_types import DESCRIPTIONS
from medalign.errors import ConfigError
from medalign.training.schedule import resolve_steps

NEEDED = "student: {path: a}\nteacher: {path: b}\ndata: {train: [c]}\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(NEEDED)
    return str(path)


def test_overrides_win_and_types_are_kept(recipe):
    words = ["--train.steps", "5", "--losses.alpha=2", "--data.train", "x", "--student.lora.rank", "8"]
    settings = config.load(recipe, [*words, "--log.wandb", "off", "--teacher.random_weights_seed", "3"])
    assert settings.train.steps == 5 and settings.losses.alpha == 2.0 and settings.data.folders == ["x"]
    assert settings.student.lora.rank == 8 and settings.log.wandb == "off"
    assert settings.teacher.random_weights_seed == 3
    assert type(settings.train.steps) is int and type(settings.losses.alpha) is float  # not jsonargparse's subclasses


def test_the_dump_is_complete_and_reads_back(recipe, tmp_path):
    settings = config.load(recipe, ["--train.lr", "0.5"])
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(settings))
    assert config.read(path) == settings


def test_a_run_does_not_write_into_its_shards(recipe, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "shards")
    for folder in ("shards", "link"):
        with pytest.raises(ConfigError, match=r"run\.dir .* is a folder of shards"):
            config.load(recipe, ["--data.train", str(tmp_path / "shards"), "--run.dir", str(tmp_path / folder)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.stps", "5"], "'train.stps' in the command line; the nearest known key is 'train.steps'"),
        (["--train.steps", "many"], "^the command line: train.steps is many; it must be a whole number or null$"),
        (["--train.steps", "1e3"], "^the command line: train.steps is 1e3; it must be a whole number or null$"),
        (["--train.epochs", "nan"], "^the command line: train.epochs is nan; it must be > 0 and < inf"),
        (["--student.lora.rank", "x"], "^the command line: student.lora.rank is x; it must be a whole number$"),
        (["--student.steering", "2"], "^the command line: student.steering is 2; it must be true or false$"),
        (["--data.weights", "a"], "^the command line: data.weights is a; it must be a list, each item a number$"),
        (["--log.wandb", "a"], "^the command line: log.wandb is a; it must be one of off, offline, online$"),
        (["--run.seed", "-1"], "run.seed is -1; it must be >= 0 and < 4294967296"),
        (["--run.seed", "4294967296"], "run.seed is 4294967296"),
        (["--losses.impl", "magic"], "losses.impl.*magic"),
        (["--losses.alpha", "-1"], "losses.alpha is -1; it must be >= 0"),
        (["--train.micro_batch_size", "0"], "train.micro_batch_size is 0; it must be > 0"),
        (["stray"], "stray"),
        (["--student.layer", "0"], "student.layer is 0; it must be > 0 .the tapped block needs one before it"),
    ],
)
def test_the_message_gives_the_invalid_word(recipe, words, message):
    with pytest.raises(ConfigError, match=message):
        config.load(recipe, words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student: {pth: a}", "'student.pth'.*'student.path'"),
        ("train: {steps: many}", "^recipe .*bad.yaml: .*train.steps"),
        ("- a", "must contain sections"),
        ("a: [", "not YAML"),
        ("student: {path: a}", "teacher.path is not set"),
        ("teacher: {path: a}", "student.path is not set"),
        ("student: {path: a}\nteacher: {path: b}", "data.train is not set"),
    ],
)
def test_the_message_gives_the_invalid_part_of_a_recipe(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(str(path))


def test_a_recipe_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match=r"recipe .*model\.safetensors is not text"):
        config.load(str(path))


def test_the_message_for_an_unknown_recipe_suggests_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean phantom"):
        config.load("phantm")


def test_the_message_for_a_key_without_a_near_name_points_to_the_help():
    with pytest.raises(ConfigError, match="unknown key 'zzqq' .*medalign train --help"):
        config.load("phantom", ["--zzqq", "1"])


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked", "triton"])
def test_every_kernel_implementation_can_be_selected(impl):
    assert config.load("phantom", ["--data.train", "c", "--losses.impl", impl]).losses.impl == impl


@pytest.mark.parametrize(
    "word, value",
    [
        ("train.lr", "-1"),
        ("student.lora.rank", "0"),
        ("student.lora.alpha", "0"),
        ("student.epsilon", ".nan"),
        ("train.weight_decay", "-1"),
        ("student.lora.dropout", "3"),
        ("data.max_skip_fraction", "7"),
        ("data.max_length", "0"),
        ("data.workers", "-1"),
        ("data.shuffle_block", "0"),
        ("data.weights", "[-1]"),
        ("train.warmup_ratio", "1.5"),
        ("train.max_grad_norm", "-2"),
        ("checkpoint.save_total_limit", "0"),
        ("log.interval", "0"),
    ],
)
def test_values_out_of_range_are_refused_with_the_name_of_the_setting(word, value):
    with pytest.raises(ConfigError, match=word.replace(".", r"\.") + f" is {value.strip('[]')}; it must be "):
        config.load("phantom", ["--data.train", "c", f"--{word}", value])


def test_no_teacher_is_needed_without_distillation(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text("student: {path: a}\ndata: {train: c}\nlosses: {alpha: 0, beta: 0}\n")
    assert not config.load(str(path)).distils


@pytest.mark.parametrize(
    ("text", "words", "decides"),
    [
        ("", [], (1000, None)),
        ("train: {steps: 7}", [], (7, None)),
        ("train: {epochs: 9}", [], (None, 9.0)),
        ("train: {epochs: 9, steps: null}", [], (None, 9.0)),
        ("train: {epochs: 9}", ["--train.steps", "50"], (50, None)),
        ("train: {epochs: 9}", ["--train.steps=0"], (0, None)),
        ("train: {epochs: 9}", ["--train.epochs", "2.5"], (None, 2.5)),
        ("train: {steps: 7}", ["--train.epochs", "2.5"], (None, 2.5)),
        ("train: {steps: 7}", ["--train.epochs", "null"], (7, None)),
    ],
)
def test_steps_or_epochs_decide_and_the_command_line_overrides_the_recipe(recipe, tmp_path, text, words, decides):
    path = tmp_path / "length.yaml"
    path.write_text(NEEDED + text)
    settings = config.load(str(path), words)
    assert (settings.train.steps, settings.train.epochs) == decides
    path.write_text(config.dump(settings))
    assert config.read(path) == settings


@pytest.mark.parametrize(
    ("text", "words", "decides"),
    [
        ("", [], (0.03, None)),
        ("train: {warmup_steps: 7}", [], (None, 7)),
        ("train: {warmup_steps: 7}", ["--train.warmup_ratio", "0.5"], (0.5, None)),
        ("train: {warmup_ratio: 0.1}", ["--train.warmup_steps=0"], (None, 0)),
    ],
)
def test_a_ratio_or_steps_decide_the_warmup(recipe, tmp_path, text, words, decides):
    path = tmp_path / "warmup.yaml"
    path.write_text(NEEDED + text)
    settings = config.load(str(path), words)
    assert (settings.train.warmup_ratio, settings.train.warmup_steps) == decides
    path.write_text(config.dump(settings))
    assert config.read(path) == settings


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (
            "train: {warmup_ratio: 0.1, warmup_steps: 7}",
            [],
            "train.warmup_ratio is 0.1 and train.warmup_steps is 7; set one of them",
        ),
        ("train: {warmup_ratio: null}", [], "neither train.warmup_ratio nor train.warmup_steps is set"),
        ("train: {steps: 7, epochs: 9}", [], "train.steps is 7 and train.epochs is 9.0; set one of them"),
        ("", ["--train.steps", "7", "--train.epochs", "9"], "train.steps is 7 and train.epochs is 9.0"),
        ("train: {steps: null}", [], "neither train.steps nor train.epochs"),
        ("train: {epochs: 9}", ["--train.epochs", "null"], "neither train.steps nor train.epochs"),
        ("train: {epochs: 0}", [], "train.epochs is 0; it must be > 0 and < inf .train.steps 0 writes"),
        ("train: {epochs: .nan}", [], "train.epochs is nan"),
        ("train: {epochs: .inf}", [], "train.epochs is inf"),
        ("train: {epochs: true}", [], "train.epochs"),
        ("train: {steps: -1}", [], "train.steps is -1; it must be >= 0"),
        (
            "train: {epochs: 9}",
            ["--data.weights", "[1]"],
            r"data.weights is \[1.0\]: .*; set train.steps",
        ),
    ],
)
def test_both_or_neither_of_two_alternatives_is_refused(tmp_path, text, words, message):
    path = tmp_path / "length.yaml"
    path.write_text(NEEDED + text)
    with pytest.raises(ConfigError, match=message):
        config.load(str(path), words)


def test_the_dump_of_epochs_gives_the_steps_and_reads_back_as_epochs(recipe, tmp_path):
    settings = config.load(recipe, ["--train.epochs", "9"])
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(resolve_steps(settings, 1797)))
    assert path.read_text().startswith("# 9.0 epochs are 505 steps\n")
    assert config.read(path) == settings


def test_the_help_describes_ranges_in_words():
    text = " ".join(config.describe_settings().split())
    assert "Dropout before the adapter. (type: number in [0, 1), default: 0.0)" in text
    assert "(type: integer > 0 | null, default: null)" in text
    assert not [name for name in DESCRIPTIONS if name != "Seed" and name in text] and "type: Seed" not in text
    assert set(value_types.__all__) == {"DESCRIPTIONS", *DESCRIPTIONS}
