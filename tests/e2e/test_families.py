"""A run of every family on two real ranks under ZeRO-3, with both losses, and answers of its checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from medalign import Decoding
from medalign.inference import generate
from tests.e2e.conftest import losses, train
from tests.unit.student.families.cases import CASES

FAMILIES = sorted(set(CASES) - {"llava"})  # all other runs here are of it


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_on_two_ranks(name: str, recipe: Path, tmp_path: Path) -> None:
    settings = CASES[name].config(CASES[name].save(tmp_path / "student"), train_projector=True)
    words = [f"--student.path={settings.path}", "--student.train_projector=true", "--data.max_length=400"]
    words += [f"--student.vision_tower={settings.vision_tower}", "--train.steps=3", "--engine.deepspeed=zero3"]
    words += [f"--student.image_size={settings.image_size or 'null'}"]
    train(recipe, tmp_path / "run", *words, world=2)
    rows = losses(tmp_path / "run")
    assert len(rows) == 3 and all(math.isfinite(value) and value != 0 for row in rows for value in row[1:6])
    film = tmp_path / "film.png"
    Image.linear_gradient("L").resize((90, 60)).save(film)
    answer = generate(
        tmp_path / "run", [film], "Is there an effusion?", tmp_path / "map.png", Decoding(max_new_tokens=4)
    )
    assert answer.attention is not None and sum(answer.attention) > 0
    assert (tmp_path / "map.png").is_file()
