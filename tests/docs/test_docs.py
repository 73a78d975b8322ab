"""The documentation builds without a warning, and its commands exist and run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```bash\n(?P<text>.*?)```", re.DOTALL)


class Block(NamedTuple):
    """A fenced block of commands."""

    page: str
    mark: str  # "runs", or "needs: ..." for what a test does not have
    lines: list[str]


def blocks() -> Iterator[Block]:
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
            text = match["text"].replace("\\\n", " ")
            lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
            yield Block(str(page.relative_to(ROOT)), match["mark"] or "", lines)


def medalign_commands() -> list[tuple[str, list[str]]]:
    """Page and words of each call of medalign, whichever launcher starts it."""
    found = []
    for block in blocks():
        for line in block.lines:
            words = shlex.split(line, comments=True)
            if "medalign" in words:
                found.append((block.page, words[words.index("medalign") + 1 :]))
    return found


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def help_of() -> dict[str, str]:
    """What `--help` of each command that the documentation calls says."""
    texts = {}
    for _, words in medalign_commands():
        name = " ".join(words[: 2 if words[0] == "shards" else 1])
        if name not in texts:
            asked = [sys.executable, "-m", "medalign", *name.split(), "--help"]
            result = run(asked, ROOT)
            assert result.returncode == 0, f"{name}: {result.stderr}"
            texts[name] = result.stdout
    return texts


def test_the_site_builds_without_a_warning_and_can_be_searched(tmp_path):
    result = run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)], ROOT)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "search" / "search_index.json").read_text())
    assert any("train.micro_batch_size" in entry["text"] for entry in found["docs"])
    pages = "".join(page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html"))
    assert not re.search(r"(?:src|href)=\"https://fonts\.", pages), "a page asks a font server"


def test_every_block_of_commands_runs_or_says_what_it_needs():
    assert [b for b in blocks() if b.mark != "runs" and not b.mark.startswith("needs: ")] == []


def test_every_option_exists(help_of):
    assert len(help_of) >= 8
    for page, words in medalign_commands():
        text = help_of[" ".join(words[: 2 if words[0] == "shards" else 1])]
        known = text + (help_of["train"] if words[0] == "inspect" else "")
        for word in words:
            if word.startswith("--"):
                assert word in known, f"{page}: {' '.join(words)}: no option {word}"


def test_blocks_that_claim_to_run_do(tmp_path):
    for number, block in enumerate(b for b in blocks() if b.mark == "runs"):
        folder = tmp_path / str(number)
        folder.mkdir()
        for line in block.lines:
            words = shlex.split(line, comments=True)
            assert words[0] == "medalign", line
            result = run([sys.executable, "-m", *words], folder)
            assert result.returncode == 0, f"{block.page}: {line}\n{result.stderr}"


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
