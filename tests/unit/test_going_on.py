"""What a run may change when it goes on, and what it may not."""

import pytest

from medalign import config
from medalign.checkpoint.state import Progress
from medalign.errors import ConfigError
from medalign.run import _prepare_folder, _say_end

WORDS = ["--data.train", "shards", "--student.path", "/one/models/llava", "--teacher.path", "/one/models/clip"]


def begun(folder, *words):
    return config.load("phantom", [*WORDS, "--run.dir", str(folder), *words])


@pytest.mark.parametrize("word, value", [("run.seed", "5"), ("train.lr", "0.5"), ("student.layer", "3")])
def test_what_shapes_the_run_must_stay(tmp_path, word, value):
    _prepare_folder(begun(tmp_path), tmp_path)
    written = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=rf"config\.yaml has {word} = .*the command says {value}.*--run\.dir"):
        _prepare_folder(begun(tmp_path, f"--{word}", value), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == written


def test_models_may_move_with_the_folders_above_them(tmp_path):
    _prepare_folder(begun(tmp_path), tmp_path)
    _prepare_folder(begun(tmp_path, "--student.path", "/two/llava", "--train.micro_batch_size", "8"), tmp_path)
    assert config.read(tmp_path / "config.yaml").student.path == "/two/llava"
    with pytest.raises(ConfigError, match=r"student\.path"):
        _prepare_folder(begun(tmp_path, "--student.path", "/two/other"), tmp_path)


def test_the_end_of_a_run_tells_what_was_replaced_and_cut(tmp_path, caplog):
    progress = Progress(step=8, samples=32, ranks=1, skipped=3, truncated=5)
    with caplog.at_level("INFO", logger="medalign"):
        _say_end(begun(tmp_path), tmp_path, progress)
    assert "8 steps, 32 samples; 3 bad samples replaced, 5 cut to 160 tokens" in caplog.text
