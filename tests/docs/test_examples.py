"""The blocks that are marked with `runs` in the documentation run, each page in its own folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from medalign import phantom
from medalign.evaluation.metrics import Prediction, write_predictions
from tests.docs.pages import ROOT, RUNS, RUNS_AS, Block, blocks

EXAMPLE = "example.py"
ALL_COMMANDS = """
import json, sys
from medalign.__main__ import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
"""


def run(words: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "0"}
    found = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, f"{' '.join(words)[:200]}\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}"


def programs() -> dict[str, dict[str, str]]:
    """Return page -> file -> text. Blocks without a file name are joined in example.py, which is run."""
    found: defaultdict[str, defaultdict[str, str]] = defaultdict(lambda: defaultdict(str))
    for block in blocks("python"):
        if block.mark == RUNS or block.mark.startswith(RUNS_AS):
            found[block.page][block.mark.removeprefix(RUNS_AS) if block.mark != RUNS else EXAMPLE] += block.text + "\n"
    return {page: dict(files) for page, files in found.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the examples: shards, a film, an evaluated run, images of a data set."""
    phantom.write_phantoms(tmp_path / "data", train=16, val=2, seed=0)
    film = phantom.study(0, 0).image
    film.save(tmp_path / "film.png")
    (tmp_path / "my_images").mkdir()
    film.save(tmp_path / "my_images" / "a1.png")
    (tmp_path / "my_images" / "answers.csv").write_text("a1.png,Is there an effusion?,no\nlost.png,Normal?,yes\n")
    row = Prediction("a1", "report", "Describe the film.", "No effusion.", "", "No effusion is seen.", "stop")
    write_predictions(tmp_path / "runs/first/evaluation/val/predictions.jsonl", [row])
    return tmp_path


@pytest.mark.parametrize("page", programs())
def test_python_runs(page, folder):
    for name, text in programs()[page].items():
        (folder / name).write_text(text, encoding="utf-8")
    run([sys.executable, EXAMPLE], folder)
    for block in commands():
        if block.page == page:
            run_commands(block, folder)


def test_commands_run(tmp_path):
    """Those of pages without Python; the others need the modules of their page."""
    for number, block in enumerate(block for block in commands() if block.page not in programs()):
        folder = tmp_path / str(number)
        folder.mkdir()
        run_commands(block, folder)


def commands() -> list[Block]:
    """All blocks of commands that run."""
    return [block for block in blocks("bash") if block.mark == RUNS]


def run_commands(block: Block, folder: Path) -> None:
    for words in block.commands():
        assert words[0] == "medalign", words
    lines = [words[1:] for words in block.commands()]
    run([sys.executable, "-c", ALL_COMMANDS, json.dumps(lines)], folder)
