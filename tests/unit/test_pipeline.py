"""The number of samples with an image is logged before anything is loaded. Distilling without one is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medalign import assembly, pipeline, run
from medalign.__main__ import main
from medalign.config import load
from medalign.data.shards.records import Record
from medalign.data.shards.writer import write_shards
from medalign.errors import ConfigError
from medalign.phantom.records import records

WITHOUT_LOSSES = ["--losses.alpha", "0", "--losses.beta", "0"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight samples each: all, three or none with an image."""
    whole = list(records(4, 0, "train"))[:8]
    bare = [Record(one.key, (), {**one.fields, "boxes": []}) for one in whole]
    folder = tmp_path_factory.mktemp("counted")
    for name, packed in {"all": whole, "some": [*whole[:3], *bare[3:]], "none": bare}.items():
        assert write_shards(packed, folder / name).refused == ()
    return {path.name: path for path in folder.iterdir()}


def words(*paths: Path) -> list[str]:
    return ["phantom", "--data.train", json.dumps([str(path) for path in paths])]


def test_counts_are_logged_for_each_folder(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *words(folders["all"], folders["some"], folders["none"]), "--keys"]) == 0
    out, err = capsys.readouterr()
    assert f"{folders['all']}: 8 samples, all with images" in err
    assert f"{folders['some']}: 8 samples, 3 with images, 5 without" in err
    assert f"{folders['none']}: 8 samples, none with images, 8 without" in err
    assert json.loads(out)["step"] == 0  # the output contains only the lines of keys


@pytest.mark.parametrize("command", [["inspect", "--keys"], ["inspect"], ["train"]])
def test_distilling_without_images_is_refused(
    folders: dict[str, Path],
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for module, loads in (
        (pipeline, "check_student"),
        (assembly.loading, "load_processor"),
        (assembly.loading, "load_student"),
    ):
        monkeypatch.setattr(module, loads, loaded)
    monkeypatch.setattr(assembly, "load_tower", loaded)
    monkeypatch.setattr(run.deepspeed_engine, "start", lambda _: None)
    monkeypatch.setattr(run.deepspeed_engine, "stop", lambda: None)
    name, *options = command
    assert main([name, *words(folders["none"], folders["none"]), "--run.dir", str(tmp_path / "run"), *options]) == 2
    err = capsys.readouterr().err
    assert "has an image, but losses.alpha 1.0 and losses.beta 1.0 distil from images" in err
    assert not (tmp_path / "run/config.yaml").exists()


def test_one_loss_is_enough_to_need_images(folders: dict[str, Path]) -> None:
    config = load("phantom", [*words(folders["none"])[1:], "--losses.alpha", "0"])
    with pytest.raises(ConfigError, match=r"losses\.alpha 0\.0 and losses\.beta 1\.0"):
        pipeline.require_images(config, pipeline.open_index(config))


def test_text_only_without_distillation_is_allowed(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *words(folders["none"]), *WITHOUT_LOSSES, "--keys"]) == 0
    assert "no sample of data.train has an image: the student is trained on text only" in capsys.readouterr().err
