"""Parses the documentation's pages for the tests."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*FRONT, *sorted((ROOT / "docs").rglob("*.md"))]
RUNS, RUNS_AS, NEEDS = "runs", "runs as ", "needs: "
_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<language>bash|python)\n(?P<text>.*?)```", re.DOTALL)


class Block(NamedTuple):
    """A fenced block of commands or of Python."""

    page: str
    mark: str  # "runs", "runs as FILE" for a module that other blocks import, or "needs: ..." if a test cannot run it
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        """Return the words of each command, with continued lines joined and without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(language: str) -> Iterator[Block]:
    """Yield all blocks of a language, page by page."""
    for page in PAGES:
        for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
            if match["language"] == language:
                yield Block(str(page.relative_to(ROOT)), match["mark"] or "", language, match["text"])


def medalign_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the page and the arguments of each call of medalign, with any launcher."""
    for block in blocks("bash"):
        for words in block.commands():
            starts = [i + 1 for i, word in enumerate(words) if word == "medalign"]
            for start in starts:
                end = words.index("--") if start == starts[0] and "--" in words else len(words)
                yield block.page, words[start:end]


def command_name(arguments: list[str]) -> str:
    """Return the command that has its own help: "train", "shards jsonl", or "evaluate --decoding vcd"."""
    if arguments[0] == "shards" and ":" in arguments[1]:  # the page's own converter; it has the options of all
        return "shards jsonl"
    return " ".join([*arguments[: 2 if arguments[0] == "shards" else 1], *_methods(arguments)])


def _methods(arguments: list[str]) -> list[str]:
    """Return --decoding with the packaged methods that it names, whose settings the help then lists."""
    named = arguments[arguments.index("--decoding") + 1 :] if "--decoding" in arguments else []
    packaged = [word for word in takewhile(lambda word: not word.startswith("--"), named) if ":" not in word]
    return ["--decoding", *packaged] if packaged else []


def hook(name: str) -> ModuleType:
    """Load a module of docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
