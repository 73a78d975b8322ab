"""The methods by name, their settings on the command line, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medalign.cli.decoding import read_decodings
from medalign.cli.main import build_parser
from medalign.config import LoraConfig, StudentConfig
from medalign.decoding.base import Decoding
from medalign.decoding.checks import require_methods
from medalign.decoding.registry import METHODS, find_method
from medalign.errors import ConfigError
from tests.own_method import Biased

ROOT = Path(__file__).parents[3]
OWN = "tests.own_method:Biased"
RUN = ["evaluate", "runs/first", "--data", "data/val"]


def parse(*words: str) -> list[Decoding]:
    return read_decodings(build_parser().parse_args([*RUN, *words]))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_name_and_a_line_per_setting(name: str, capsys: Any) -> None:
    kind = find_method(name)
    assert kind.name == name and kind.__doc__
    kind()  # the published settings are in range
    with pytest.raises(SystemExit):
        parse("--decoding", name, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{METHODS[name].summary} ({METHODS[name].cost})" in shown
    for key, value in list(kind().describe().items())[1:]:
        assert f"--{key.replace('decoding', f'decoding.{name}')} " in shown
        default = str(value).lower() if isinstance(value, bool) else value
        assert (f"(default {default})" if default != "" else "(required)") in shown


def test_greedy_is_the_default() -> None:
    assert parse() == [Decoding()] == parse("--decoding", "greedy")
    assert Decoding().describe()["decoding"] == "greedy"


def test_settings_come_from_the_command_line() -> None:
    words = ["--decoding", "greedy", OWN, "--decoding.token", "5", "--decoding.biased.shown=false", "--do-sample"]
    greedy, own = parse(*words)
    assert greedy == Decoding(do_sample=True)
    assert own == Decoding(do_sample=True, method=Biased(token=5, shown=False))
    assert own.describe()["decoding"] == "biased" and own.describe()["decoding.token"] == 5


def test_a_seed_is_that_of_the_methods_with_noise() -> None:
    assert [one.seed for one in parse("--decoding", "greedy", "vcd", "--seed", "3")] == [0, 3]
    assert [one.seed for one in parse("--decoding", "greedy", "vcd", "--seed", "3", "--do-sample")] == [3, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--decoding", "vdc"], "--decoding 'vdc' is not a method; choose one of greedy, "),
        (["--decoding", "tests.own_method:Other"], "--decoding 'tests.own_method:Other' cannot be imported"),
        (["--decoding", "tests.own_method:NotAMethod"], "is not a subclass of medalign.decoding.base.Method"),
        (["--decoding", "medalign.decoding.base:Method"], "is a base of methods without a name"),
        (["--decoding", "medalign.decoding.contrast:Contrast"], "is a base of methods without a name"),
        (["--decoding", "vhr", "--decoding.alpha=1e300"], "it must be from 0 to 1000"),
        (["--decoding", OWN, OWN], "--decoding names biased twice"),
        (["--decoding", OWN, "--decoding.token=-1"], "--decoding.biased.token is -1; it must be at least 0"),
        (["--decoding", OWN, "--decoding.bias=nan"], "--decoding.biased.bias is nan; it must be at most 1000"),
        (["--decoding", OWN, "--num-beams=2"], "biased cannot be combined with --num-beams 2: it is only an example"),
        (["--decoding", OWN, "--seed=2"], "--seed 2 has no effect without --do-sample"),
    ],
)
def test_a_wrong_choice_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--decoding.token=5"], "unrecognized arguments: --decoding.token=5"),
        (["--decoding", OWN, "--decoding.shown=yes"], "'yes' is neither true nor false"),
        (["--decoding", OWN, "--decoding.sign=same"], "invalid choice: 'same'"),
    ],
)
def test_a_wrong_word_is_named(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_student_is_refused_before_its_weights_are_read(student_folder: Any) -> None:
    config = StudentConfig(path=str(student_folder), layer=2, lora=LoraConfig(rank=4))
    require_methods([Decoding().method, Biased()], config)
    with pytest.raises(ConfigError, match="token is 999999, but the student has"):
        require_methods([Biased(token=999999)], config)


def test_the_costs_in_the_documentation_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "tools/benchmarks/results/decoding.json").read_text())["students"]
    small, wide = (measured[name]["over_greedy"] for name in ("phantom", "wide"))
    text = (ROOT / "docs/decoding.md").read_text(encoding="utf-8")
    for name in small.keys() - {"greedy"}:
        times = [(rows[name]["time"], *rows[name]["time_range"]) for rows in (small, wide)]
        cells = [f"{middle:.1f} ({low:.1f} to {high:.1f})" for middle, low, high in times]
        cells += [f"{rows[name]['memory']:.1f}" for rows in (small, wide)]
        assert f"| `{name}` | {' | '.join(cells)} |" in text
    limits = {"vcd": 2.1, "m3id": 2.1, "avisc": 2.1, "damro": 2.1, "imccd": 2.1, "dola": 1.15}
    assert all(wide[name]["time"] <= limit for name, limit in limits.items())


@pytest.mark.parametrize(
    ("file", "limits"),
    [
        ("second_cost", {"second": 2.1, "second, once": 2.1}),
        ("cai_cost", {"cai": 1.15}),
        ("interventions", {"pai": 2.1, "pai, gamma 1": 1.15, "vhr": 1.15}),
        ("medvcd_cost", {"medvcd": 1.15}),
    ],
)
def test_further_costs_are_in_the_documentation_and_within_their_limits(file: str, limits: dict[str, float]) -> None:
    text = (ROOT / "docs/results/decoding.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / f"tools/benchmarks/results/decoding_{file}.json").read_text())["students"]
    for name, limit in limits.items():
        for student in ("phantom", "wide"):
            row = measured[student]["over_greedy"][name]
            assert row["time"] <= limit
            assert "{:.2f} ({:.2f} to {:.2f})".format(row["time"], *row["time_range"]) in text


def test_the_table_of_the_documentation_names_every_method_and_setting() -> None:
    text = (ROOT / "docs/decoding.md").read_text(encoding="utf-8").partition("## Cost")[0]
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    for name, entry in METHODS.items():
        row, method = rows[name], find_method(name)()
        assert entry.cost in row, name
        for key in list(method.describe())[1:]:
            assert f"`{key.removeprefix('decoding.')}`" in row, (name, key)
        assert ("beams" in row.split("|")[-2]) == bool(method.beams), name


def test_a_setting_of_several_methods_needs_its_long_name(capsys):
    with pytest.raises(SystemExit):
        parse("--decoding", "vcd", "m3id", "--decoding.beta", "0.2")
    error = capsys.readouterr().err
    assert "--decoding.beta is a setting of several methods; write --decoding.vcd.beta or --decoding.m3id.beta" in error
