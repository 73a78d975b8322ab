"""The documentation builds without warnings, and the settings, options, files and links in it exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from medalign.config import Config
from tests.docs.pages import FRONT, NEEDS, PAGES, ROOT, RUNS, RUNS_AS, blocks, command_name, hook, medalign_commands

GENERATED = ("tools/benchmarks/results/gpu_check",)  # what a command in the documentation writes
ALL_HELP = """
import contextlib, io, json, runpy, sys
texts = {}
for name in json.loads(sys.argv[1]):
    sys.argv = ["medalign", *name.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        runpy.run_module("medalign", run_name="__main__")
    texts[name] = text.getvalue()
print(json.dumps(texts))
"""


def run(words: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    found = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, f"{' '.join(words)[:200]}\n{found.stderr}"
    return found.stdout


@pytest.fixture(scope="module")
def help_of() -> dict[str, str]:
    """The `--help` text of each command in the documentation, all from one process."""
    names = sorted({command_name(arguments) for _, arguments in medalign_commands()})
    return json.loads(run([sys.executable, "-c", ALL_HELP, json.dumps(names)], ROOT))


def settings(kind: type = Config, prefix: str = "") -> set[str]:
    """Return the dotted names of all settings and sections."""
    hints, names = get_type_hints(kind), set()
    for item in fields(kind):
        names.add(prefix + item.name)
        if is_dataclass(hints[item.name]):
            names |= settings(hints[item.name], f"{prefix}{item.name}.")
    return names


def test_the_site_builds_without_a_warning_and_can_be_searched(tmp_path):
    run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)], ROOT)
    found = json.loads((tmp_path / "search" / "search_index.json").read_text())
    assert any("train.micro_batch_size" in entry["text"] for entry in found["docs"])
    pages = "".join(page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html"))
    assert not re.search(r"(?:src|href)=\"https://fonts\.", pages), "a page asks a font server"
    assert "{{" not in re.sub(r"<script.*?</script>", "", pages, flags=re.DOTALL), "a placeholder was not replaced"


def test_every_block_runs_or_is_marked_with_what_it_needs():
    marked = [*blocks("bash"), *blocks("python")]
    assert marked and [b for b in marked if b.mark != RUNS and not b.mark.startswith((RUNS_AS, NEEDS))] == []


def test_every_option_exists(help_of):
    assert len(help_of) >= 8
    for page, arguments in medalign_commands():
        known = help_of[command_name(arguments)] + (
            help_of["train"] if arguments[0] in ("inspect", "plan", "doctor", "targets") else ""
        )
        assert known, f"{page}: unknown command {command_name(arguments)}"
        for word in arguments:
            if word.startswith("--"):
                option = re.escape(word.partition("=")[0])
                assert re.search(rf"{option}(?![\w.-])", known), f"{page}: {' '.join(arguments)}: no option {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_and_files_on_a_page_exist(page):
    text, known = page.read_text(encoding="utf-8"), settings()
    sections = "|".join(item.name for item in fields(Config))
    for name in re.findall(rf"[`-]((?:{sections})(?:\.[a-z_]+)+)(?![\w.*(])", text):
        assert name in known or (page.parent / name).exists(), f"unknown setting {name}"
    for path in re.findall(r"(?<![\w/.-])(?:tools|tests|slurm|ds_configs)/[\w./-]*\w", text):
        assert (ROOT / path).exists() or path.startswith(GENERATED), f"{path} does not exist"


@pytest.mark.parametrize("page", FRONT, ids=lambda page: page.name)
def test_links_are_valid(page):
    """The build with mkdocs checks the links in docs/."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


class TestQuickstartFigures:
    table = hook("quickstart_table")

    def test_the_readme_has_the_table_of_the_file(self):
        assert self.table.scores(self.table.load()) in (ROOT / "README.md").read_text(encoding="utf-8")

    def test_arms_that_were_not_run_have_no_row(self):
        facts = {"arms": {arm: self.table.load()["arms"][arm] for arm in ("language", "medalign")}}
        assert self.table.scores(facts).count("\n") == 3
        assert self.table.differences(facts).count("\n") == 4

    def test_one_seed_has_no_spread_and_no_interval(self):
        one = {"closed_accuracy": {"mean": 0.5, "seeds": [0.5]}}
        facts = {
            "arms": {
                arm: one | dict.fromkeys(("open_exact", "bleu"), one["closed_accuracy"])
                for arm in ("language", "medalign")
            }
        }
        assert "| language loss only | 50.0 |" in self.table.scores(facts)
        assert self.table.differences(facts).endswith("| +0.0 |  |")

    def test_the_figures_in_the_text_of_the_page_are_correct(self):
        """The sentences of docs/results/quickstart.md that contain a figure."""
        arms = self.table.load()["arms"]

        def gain(arm: str, other: str, name: str = "closed_accuracy") -> list[float]:
            return self.table.paired(arms, arm, other, name)

        assert min(gain("medalign", "language") + gain("medalign", "language", "open_exact")) > 0
        assert round(sum(gain("medalign", "language")) / 3) == 8
        assert round(sum(gain("untrained", "language")) / 3) == 2
        assert round(sum(gain("steered", "language")) / 3) == 4
        assert all(sum(gain(arm, "language", "open_exact")) < 0 for arm in ("steered", "untrained"))
        assert all(min(gain("medalign", arm, "open_exact")) > 0 for arm in ("steered", "untrained"))
        row = next(line for line in self.table.differences(self.table.load()).splitlines() if "closed accuracy" in line)
        assert " -" in row.rpartition("| ")[0].rpartition("| ")[2] or "| -" in row, "the interval includes zero"
        assert (
            f"{100 * arms['medalign']['box_area']['mean']:.1f} {100 * arms['medalign']['pointing_chance']['mean']:.1f}"
            == "7.4 6.9"
        )
        assert round(100 * arms["medalign"]["data_wait_share"]["mean"]) == 5
