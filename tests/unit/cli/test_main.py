"""The command line as a whole: messages and exit statuses instead of tracebacks, and help that loads no model."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import textwrap

import pytest

from medalign.cli import main as command
from medalign.cli import train
from medalign.cli.main import COMMANDS

HEAVY = ("torch", "numpy", "transformers", "deepspeed", "jsonargparse", "PIL")


def test_an_unexpected_file_error_is_one_line(monkeypatch, capsys):
    def full(_arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/mine/metrics.jsonl")

    monkeypatch.setattr(train, "run", full)
    assert command.main(["train", "phantom"]) == 2
    assert capsys.readouterr().err == "error: /runs/mine/metrics.jsonl: No space left on device\n"


def test_the_help_shows_srun_as_the_readme_does(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["train", "--help"])
    assert end.value.code == 0
    assert "srun --kill-on-bad-exit=1 python -m medalign train" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [[], ["phantom"], ["generate"], ["evaluate"], ["report"], ["export"], ["bench"], ["watch"], ["plan"], ["doctor"]],
)
def test_help_imports_nothing_heavy(words):
    script = (
        "import sys\nfrom medalign.cli.main import main\n"
        f"try:\n    main({[*words, '--help']!r})\n"
        f"except SystemExit:\n    print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_every_command_is_listed_once(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    out = capsys.readouterr().out
    for module in COMMANDS:
        assert len(re.findall(rf"^    {module.__name__.rpartition('.')[2]}\s", out, re.MULTILINE)) == 1


@pytest.mark.parametrize("name", ["train", "inspect", "plan", "doctor"])
def test_a_recipe_comes_before_the_settings(name, capsys):
    assert command.main([name, "--train.steps", "3"]) == 2
    assert (
        f"the recipe is missing; give it first: medalign {name} RECIPE. Packaged recipes: " in capsys.readouterr().err
    )


def test_the_settings_of_a_recipe_are_passed_on_unchanged(monkeypatch):
    given = []
    monkeypatch.setattr(train, "run", lambda arguments: given.append((arguments.recipe, arguments.overrides)) or 0)
    words = ["--data.train+", "a b", "--losses.alpha", "-1", "--run.dir=x", "--data.weights", "[1, 2]"]
    assert command.main(["--local_rank=3", "train", "phantom", *words]) == 0
    assert given == [("phantom", words)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "run", "--output", "x", "--nothing"], "medalign: error: unrecognized arguments: --nothing"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "the following arguments are required: COMMAND"),
        (["shards", "nothing"], "medalign shards: error: argument CONVERTER: invalid choice: 'nothing'"),
        (["phantom", "--output", "x", "--train", "0"], "argument --train: '0' is not a whole number of at least 1"),
    ],
)
def test_the_message_for_words_that_cannot_be_parsed(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rank", [True, False])
def test_a_rank_ends_without_the_last_step_of_the_interpreter(rank):
    code = """
        import atexit, os, sys
        from medalign.cli import main
        class Thread:  # as those of gloo
            def __del__(self):
                os._exit(9)
        sys.modules["thread"] = Thread()
        atexit.register(print, "the end")
        main.main = lambda: 3
        main.run()
    """
    variables = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    variables |= {"WORLD_SIZE": "2"} if rank else {}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == (3 if rank else 9) and done.stdout == "the end\n", done.stderr
