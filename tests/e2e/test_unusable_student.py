"""A student that cannot be trained ends `inspect` and `train`, on any number of ranks, with one error and status 2.

The teacher's weights are missing: the student is refused before anything looks for them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from medalign import run
from medalign.__main__ import main
from medalign.config import load
from medalign.errors import ConfigError
from tests.distributed.ranks import TIMEOUT, start
from tests.e2e.conftest import command

MESSAGES = {
    "vocabulary": "its tokenizer has 261 tokens, but its embedding has only 260 rows; resize the model",
    "flat": "its config.json has no text_config and no vision_config; it is not in the transformers ",
    "layer": "student.layer is 3, but it must be between 1 and 2",
    "template": "the student's prompt is not the beginning of its conversation: after",
    "length": "data.max_length is 30, but the template and one image with 16 tokens take 35; raise it to more than 35",
}


@pytest.fixture
def broken(student_folder: Path, teacher_folder: Path, tmp_path: Path) -> list[str]:
    """Overrides with a copy of the student and a teacher without weights."""
    shutil.copytree(student_folder, tmp_path / "student")
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    (tmp_path / "teacher" / "open_clip_model.safetensors").unlink()
    return ["--student.path", str(tmp_path / "student"), "--teacher.path", str(tmp_path / "teacher")]


def spoil(folder: Path, fault: str) -> list[str]:
    """Damage the student, or return the setting that makes it unusable."""
    tokenizer, config = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "config.json"))
    if fault == "vocabulary":
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 260, "content": "<finding>"})
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if fault == "flat":
        del config["text_config"], config["vision_config"]
        (folder / "config.json").write_text(json.dumps(config))
    if fault == "template":
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().replace("%}ASSISTANT:{%", "%}ASSISTANT:\n{%"))
    return {"layer": ["--student.layer", "3"], "length": ["--data.max_length", "30"]}.get(fault, [])


@pytest.mark.parametrize("fault", MESSAGES)
def test_inspect_and_train_refuse_alike(broken, recipe: Path, tmp_path: Path, fault: str, capsys) -> None:
    words = [*broken, *spoil(tmp_path / "student", fault)]
    assert main(["inspect", str(recipe), *words]) == 2
    assert MESSAGES[fault] in capsys.readouterr().err
    with pytest.raises(ConfigError, match=re.escape(MESSAGES[fault])):
        run._open(load(str(recipe), words))


def test_two_ranks_refuse_together(broken: list[str], recipe: Path, tmp_path: Path) -> None:
    words = [*broken, *spoil(tmp_path / "student", "vocabulary")]
    for process in start(command(recipe, tmp_path / "run", words), 2):
        shown = process.communicate(timeout=TIMEOUT)[0]
        assert process.returncode == 2, shown
        assert MESSAGES["vocabulary"] in shown and "Traceback" not in shown
    assert not (tmp_path / "run" / "config.yaml").exists()
