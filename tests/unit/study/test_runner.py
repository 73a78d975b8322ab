"""Runs of the study with stand-ins for the commands of medalign: order, interruption, result files."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from medalign import config as medalign_config
from medalign.evaluation.metrics import Prediction, write_predictions
from tools.study import runner
from tools.study.__main__ import main
from tools.study.arms import Run
from tools.study.results_file import PRIMARY, commonest_answer, false_yes, read_results

QUESTIONS = [
    ("Is there a nodule?", "yes"),
    ("Is there an effusion?", "no"),
    ("Normal?", "no"),
    ("Where?", "left"),
]
RIGHT = {"L": 2, "B": 3}  # questions that each arm answers correctly
TRIALS = {"trial-L-0.003": 0.4, "trial-L-0.0015": 0.6}  # all other runs score 0.5
PROVENANCE = {"weights": {"adapter": "0"}, "versions": {"medalign": "0"}}


class Commands:
    """Writes what each command would, and records its words."""

    def __init__(self, settings: bool) -> None:
        self.settings = settings  # whether trainings write their settings
        self.calls: list[str] = []
        self.fail_at = ""

    def __call__(self, words: Sequence[str], folder: Path) -> None:
        self.calls.append(" ".join(words[:2]))
        options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if words[0] == "phantom":
            target = folder / options["output"] / "val"
            target.mkdir(parents=True)
            (target / "index.jsonl").write_text("")
        elif words[0] == "evaluate":
            self.evaluate(folder / words[1], words[words.index("--name") + 1])
        else:
            place = folder / options["run.dir"]
            if place.name == self.fail_at:
                raise RuntimeError("the machine was switched off")
            if self.settings:
                settings = medalign_config.load("phantom", list(words[2:]), models=False, data=False)
                (place / "config.yaml").write_text(medalign_config.dump(settings))

    def evaluate(self, place: Path, name: str) -> None:
        arm, rows = place.name.split("-")[0], []
        for number, (question, answer) in enumerate(QUESTIONS):
            kind = "open" if answer == "left" else "closed"
            given = answer if number < RIGHT.get(arm, 0) else {"yes": "no", "no": "yes", "left": "right"}[answer]
            rows.append(Prediction(f"q{number}", "vqa", question, answer, kind, given, "stop"))
        rows.append(Prediction("r", "report", "Describe.", "No effusion is seen.", "", "No effusion.", "stop"))
        folder = place / "evaluation" / name
        write_predictions(folder / "predictions.jsonl", rows)
        (folder / "scores.json").write_text(json.dumps({"samples": 5, "provenance": PROVENANCE}))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Commands whose results hold only what the runner reads."""
    monkeypatch.setattr(runner, "_checkout", lambda: "abc")

    def collect(run: Run, _folder: Path, _commands: Sequence[str], commit: str) -> dict[str, Any]:
        score = TRIALS.get(run.name, 0.5)
        return {"trial": run.trial, "scores": {PRIMARY: score}, "commit": commit, "peak_lr": run.rate}

    monkeypatch.setattr(runner, "collect", collect)
    monkeypatch.setattr(runner, "commonest_answer", lambda train, test: 0.5)
    return Commands(settings=False)


@pytest.fixture
def study(tmp_path: Path, commands: Commands) -> runner.Study:
    return runner.Study(tmp_path / "study", tmp_path / "results", execute=commands)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> runner.Study:
    """Three finished runs with their whole results."""
    folder = tmp_path_factory.mktemp("study")
    study = runner.Study(folder / "study", folder / "results", execute=Commands(settings=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_checkout", lambda: "abc")
        for run in (Run("L", 10), Run("L", 11), Run("B", 10)):
            study.do(run)
    return study


def test_runs_follow_the_plan_and_are_not_repeated(study: runner.Study, commands: Commands) -> None:
    study.run(["base", "L", "B"], [10, 11])
    assert [call for call in commands.calls if not call.startswith("evaluate")] == [
        "phantom --output=data/train-10-2000",
        "phantom --output=data/test",
        "phantom --output=data/development",
        "train phantom",
        "phantom --output=data/train-9-2000",
        *["train phantom"] * 6,
        "phantom --output=data/train-11-2000",
        *["train phantom"] * 2,
        "phantom --output=data/train-10-250",
        *["train phantom"] * 2,
        "phantom --output=data/train-11-250",
        *["train phantom"] * 2,
        "phantom --output=data/train-10-1000",
        *["train phantom"] * 2,
        "phantom --output=data/train-11-1000",
        *["train phantom"] * 2,
    ]
    evaluated = [call.removeprefix("evaluate runs/") for call in commands.calls if call.startswith("evaluate")]
    assert evaluated[:7] == [
        "base-10",
        "trial-L-0.003",
        "trial-L-0.0015",
        "trial-B-0.003",
        "trial-B-0.0015",
        "L-10",
        "B-10",
    ]
    before = len(commands.calls)
    study.run(["base", "L", "B"], [10, 11])
    assert len(commands.calls) == before
    study.run(["L"], [12])
    assert commands.calls[before:] == [
        *("phantom --output=data/train-12-2000", "train phantom", "evaluate runs/L-12"),
        *("phantom --output=data/train-12-250", "train phantom", "evaluate runs/L-250-12"),
        *("phantom --output=data/train-12-1000", "train phantom", "evaluate runs/L-1000-12"),
    ]


def test_an_interrupted_run_is_resumed_with_its_commit(
    study: runner.Study, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.fail_at = "trial-L-0.0015"
    with pytest.raises(RuntimeError):
        study.run(["L"], [10])
    assert list(read_results(study.results)) == ["trial-L-0.003"]
    commands.fail_at = ""
    monkeypatch.setattr(runner, "_checkout", lambda: "def")
    before = len(commands.calls)
    study.run(["L"], [10])
    assert commands.calls[before : before + 2] == ["train phantom", "evaluate runs/trial-L-0.0015"]
    commits = {name: found["commit"] for name, found in read_results(study.results).items()}
    assert commits["trial-L-0.0015"] == "abc" and commits["L-10"] == "def"


def test_the_better_trial_is_used(study: runner.Study) -> None:
    study.run(["L", "B"], [13])
    found = read_results(study.results)
    assert (found["L-13"]["peak_lr"], found["B-13"]["peak_lr"]) == (1.5e-3, 3e-3)


def test_a_result_holds_what_every_analysis_needs(finished: runner.Study) -> None:
    found = read_results(finished.results)["B-10"]
    assert (found["arm"], found["seed"], found["films"], found["trial"]) == ("B", 10, 2000, False)
    assert found["correct"] == "1110" and found["questions"] == 4
    assert found["scores"][PRIMARY] == 0.75
    assert found["scores"]["closed_accuracy"] == 1 and found["scores"]["open_exact"] == 0
    assert found["scores"]["false_yes"] == 0 and found["scores"]["bleu"] >= 0
    assert found["peak_lr"] == 3e-3 and found["steps"] == 600
    assert found["commands"][0].startswith("medalign train phantom --data.train=data/train-10-2000/train")
    assert "--run.seed=10" in found["commands"][0] and str(finished.folder) not in json.dumps(found)


def test_settings_are_those_of_the_arm_and_not_of_the_seed(finished: runner.Study) -> None:
    one, other, medalign = (read_results(finished.results)[name] for name in ("L-10", "L-11", "B-10"))
    assert one["settings"] == other["settings"] != medalign["settings"]
    for name in ("student", "teacher", "keys"):
        assert one[name] == other[name] == medalign[name]


def test_finished_runs_are_scored_again(finished: runner.Study) -> None:
    for name in ("trial-L-0.003", "trial-L-0.0015"):
        (finished.results / f"{name}.json").write_text(json.dumps({"trial": True, "scores": {PRIMARY: 0.5}}))
    before = (finished.results / "L-10.json").read_text()
    (finished.results / "L-10.json").unlink()
    assert runner.collect_again(finished) == ["L-10", "L-11"]  # B has no trial, so its learning rate is not known
    assert (finished.results / "L-10.json").read_text() == before


def test_finished_runs_are_asked_about_other_films(
    study: runner.Study, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(runner, "write_probes", lambda source, output: made.append((source.name, output.name)))
    study.run(["L"], [13])
    before = len(commands.calls)
    for _ in range(2):
        assert runner.probe(study) == ["L-13"]
    assert commands.calls[before:] == ["evaluate runs/L-13"] * 2 and set(made) == {("val", "probes")}
    names = {path.name for path in study.place(Run("L", 13)).glob("evaluation/*")}
    assert names == {"test", "blank", "other"}


def test_the_result_has_the_probes_that_were_evaluated(finished: runner.Study) -> None:
    place = finished.place(Run("B", 10))
    assert "blank_film" not in read_results(finished.results)["B-10"]["scores"]
    Commands(settings=True).evaluate(place, "blank")
    finished.report(Run("B", 10))
    scores = read_results(finished.results)["B-10"]["scores"]
    assert scores["blank_film"] == 0.75 and "other_film" not in scores


def test_the_most_common_training_answer(tmp_path: Path) -> None:
    for name, samples in (
        ("train", [("Which?", "left"), ("Which?", "left"), ("Which?", "right"), ("Is it?", "yes")]),
        ("test", [("Which?", "left"), ("Which?", "right"), ("Is it?", "yes"), ("New?", "yes")]),
    ):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "shard-000000.tar", "w") as archive:
            for number, (question, answer) in enumerate(samples):
                text = json.dumps({"task": "vqa", "question": question, "answer": answer}).encode()
                member = tarfile.TarInfo(f"{number}.json")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
    assert commonest_answer(tmp_path / "train", tmp_path / "test") == 0.5  # left and yes


def test_false_yes_counts_questions_whose_answer_is_no() -> None:
    rows = [
        Prediction("a", "vqa", "?", "no", "closed", "Yes."),
        Prediction("b", "vqa", "?", "no", "closed", "No."),
        Prediction("c", "vqa", "?", "no", "closed", ""),
        Prediction("d", "vqa", "?", "yes", "closed", "yes"),
        Prediction("e", "report", "?", "no effusion", "", "yes"),
    ]
    assert false_yes(rows) == pytest.approx(1 / 3)


def test_the_command_line_refuses_what_the_plan_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["run", "--arms", "Q"], ["run", "--seeds", "9"], ["run", "--seeds", "0"]):
        with pytest.raises(SystemExit):
            main(words)
    assert "invalid choice" in capsys.readouterr().err
    assert Run("L", 10).name == "L-10"
