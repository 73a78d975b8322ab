"""Evaluation in unusual cases: damaged shards, long questions, odd names and addresses, equal keys."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import fsspec
import pytest
import torch

from medalign import evaluator
from medalign.__main__ import main
from medalign.checkpoint import export
from medalign.config import DataConfig
from medalign.contracts import Batch
from medalign.data.shards.index import ShardIndex
from medalign.data.shards.records import Record
from medalign.data.shards.writer import write_shards
from medalign.evaluation import generation
from medalign.evaluation.metrics import read_predictions
from medalign.inference import open_student
from medalign.phantom.records import records
from medalign.student.model import Student

QUICK = ["--max-new-tokens", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A copy of the trained run, only for these evaluations."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("runs") / "evaluated")


@pytest.fixture
def damaged(tmp_path: Path, shards: Path) -> Path:
    """The held-out shards with two samples whose pictures' bytes have changed."""
    return damage(shutil.copytree(shards / "val", tmp_path / "damaged"), (1, 3))


def damage(folder: Path, samples: Sequence[int]) -> Path:
    """Change the bytes of the pictures of some samples."""
    index = ShardIndex.open(folder)
    for i in samples:
        (member,) = index._members(i, (0,))
        with open(index._place(i), "r+b") as file:
            file.seek(member.offset)
            file.write(b"broken")
    return folder


def batches_of(folder: Path) -> list[dict]:
    """The batches that an evaluation in progress has answered."""
    files = sorted(folder.glob(".predictions.jsonl.rank-*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def scores(run: Path, name: str) -> dict:
    return json.loads((run / "evaluation" / name / "scores.json").read_text())


def test_too_many_unreadable_samples_end_the_evaluation_and_the_answers_are_kept(run, damaged, capsys):
    words = ["evaluate", str(run), "--data", str(damaged), "--batch-size", "3", *QUICK]
    assert main(words) == 2
    shown = capsys.readouterr()
    keys = ShardIndex.open(damaged).keys
    assert f"2 of {len(keys)} samples could not be used, more than --max-skip-fraction 0.01" in shown.err
    folder = run / "evaluation" / "damaged"
    assert str(folder / ".predictions.jsonl.rank-*") in shown.err and not (folder / "scores.json").exists()
    assert len(batches_of(folder)) > 1
    assert main([*words, "--max-skip-fraction", "0.02"]) == 0
    assert "resuming an interrupted evaluation" in (shown := capsys.readouterr()).err
    assert [row.key for row in read_predictions(folder / "predictions.jsonl")] == [keys[0], keys[2], *keys[4:]]
    assert f"2 of {len(keys)} samples could not be read; no score includes them" in shown.out
    assert scores(run, "damaged")["unreadable"] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.jsonl", "scores.json"]


def test_the_table_shows_only_this_evaluation(run, shards, capsys):
    for name in ("one", "two"):
        assert main(["evaluate", str(run), "--data", str(shards / "val"), "--name", name, "--limit", "3", *QUICK]) == 0
    shown = capsys.readouterr()
    (_, table) = shown.out.split("two")
    assert "one" not in table and str(run / "evaluation" / "two") in shown.err and "medalign report" in shown.err


def test_a_checkpoint_is_evaluated_into_its_run_s_folder(run, shards, tmp_path, capsys):
    checkpoint = next(run.glob("checkpoints/step-*"))
    assert main(["evaluate", str(checkpoint), "--data", str(shards / "val"), "--limit", "3", *QUICK]) == 0
    assert not (checkpoint / "evaluation").exists()
    name = f"{checkpoint.name}-val"
    assert scores(run, name)["name"] == name
    capsys.readouterr()
    assert main(["report", str(run), "--output", str(tmp_path / "run.html")]) == 0
    assert name in capsys.readouterr().out
    assert main(["report", str(checkpoint), "--output", str(tmp_path / "checkpoint.html")]) == 0
    table = capsys.readouterr().out
    assert table.startswith("val") and checkpoint.name in table


def test_the_length_limit_is_the_run_s(run, tmp_path):
    folder = export.find_export(run)
    assert json.loads((folder / "medalign.json").read_text())["max_length"] == 220
    assert open_student(run)[2].encoder.max_length == 220
    assert open_student(run, max_images=3)[2].encoder.max_length == 220 + 2 * 16
    old = shutil.copytree(folder, tmp_path / "old")
    values = json.loads((old / "medalign.json").read_text())
    del values["max_length"]
    (old / "medalign.json").write_text(json.dumps(values))
    assert open_student(old)[2].encoder.max_length == DataConfig().max_length


def test_questions_that_are_cut_are_counted(run, shards, capsys):
    words = ["evaluate", str(run), "--data", str(shards / "val"), "--name", "cut", "--limit", "4", *QUICK]
    assert main([*words, "--max-length", "48"]) == 0
    assert "4 questions were truncated to 48 tokens; --max-length raises the limit" in capsys.readouterr().err
    assert (scores(run, "cut")["truncated"], scores(run, "cut")["max_length"]) == (4, 48)
    assert main(words) == 0 and scores(run, "cut")["truncated"] == 0
    capsys.readouterr()
    assert main([*words, "--max-length", "20"]) == 2
    assert "--max-length is 20, but the template and" in capsys.readouterr().err


def repeats(token: int) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return a replacement for a student's `generate` that repeats this token."""

    def generate(_student: Student, batch: Batch, *, max_new_tokens: int, **_: object) -> tuple[torch.Tensor, None]:
        return torch.full((len(batch.input_ids), max_new_tokens), token), None

    return generate


def test_answers_that_are_cut_or_empty_are_counted(run, shards, capsys, monkeypatch):
    words = ["evaluate", str(run), "--data", str(shards / "val"), "--name", "answers", "--limit", "4", *QUICK]
    monkeypatch.setattr(Student, "generate", repeats(72))  # no end token
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "4 of 4 answers were cut off at 2 tokens; --max-new-tokens raises the limit" in shown.err
    assert "4 of 4 answers were cut off at 2 tokens (--max-new-tokens)" in shown.out
    found = scores(run, "answers")
    assert (found["max_new_tokens"], found["answers_cut"], found["limit"]) == (2, 4, 4)
    rows = read_predictions(run / "evaluation" / "answers" / "predictions.jsonl")
    assert {row.finish_reason for row in rows} == {"length"}
    assert found["answers_empty"] == 0 and not any(row.empty for row in rows)
    monkeypatch.setattr(Student, "generate", repeats(2))
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "answers were cut" not in shown.out + shown.err and "4 of 4 answers are empty" in shown.err
    assert (scores(run, "answers")["answers_cut"], scores(run, "answers")["answers_empty"]) == (0, 4)
    rows = read_predictions(run / "evaluation" / "answers" / "predictions.jsonl")
    assert {(row.finish_reason, row.empty) for row in rows} == {("stop", True)}


def test_the_log_shows_the_progress_of_the_evaluation(run, shards, capsys):
    assert (
        main(
            [
                "evaluate",
                str(run),
                "--data",
                str(shards / "val"),
                "--name",
                "log",
                "--limit",
                "4",
                "--batch-size",
                "2",
                *QUICK,
            ]
        )
        == 0
    )
    shown = capsys.readouterr().err
    assert "evaluate: 4 samples" in shown and re.search(r"evaluate: 2 of 4 samples, \d+:\d\d left", shown)
    assert re.search(r"evaluate: 4 of 4 samples in \d+:\d\d", shown)


def test_a_folder_named_twice_is_refused_before_the_student_is_loaded(run, shards, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(shards / "val", tmp_path / "copy")
    monkeypatch.setattr("medalign.evaluator.open_student", None)
    for second in (shards / "val", copy):
        assert main(["evaluate", str(run), "--data", str(shards / "val"), str(second), *QUICK]) == 2
        assert f"--data {shards / 'val'} and {second} contain the same samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "ended", "shown"),
    [
        ("", "stop", ["(empty answer)"]),
        ("no eff", "length", ["the answer is cut off at 2 tokens; --max-new-tokens raises the limit"]),
        ("", "length", ["(empty answer)", "the answer is cut off at 2 tokens; --max-new-tokens raises the limit"]),
        ("yes", "stop", []),
    ],
)
def test_generate_logs_what_the_answer_does_not_show(run, shards, tmp_path, text, ended, shown, monkeypatch, capsys):
    ShardIndex.open(shards / "val").read(0).images[0].save(tmp_path / "film.png")
    monkeypatch.setattr("medalign.inference.generate_answers", lambda *_: [generation.Answer(text, None, ended)])
    assert main(["generate", str(run), "--image", str(tmp_path / "film.png"), "--question", "Is there?", *QUICK]) == 0
    captured = capsys.readouterr()
    assert captured.out == text + "\n" and captured.err.splitlines() == shown


def test_generate_logs_that_the_question_was_cut(run, shards, tmp_path, capsys):
    ShardIndex.open(shards / "val").read(0).images[0].save(tmp_path / "film.png")
    words = ["generate", str(run), "--image", str(tmp_path / "film.png"), "--question", "Is there? " * 600, *QUICK]
    assert main(words) == 0
    assert "the question is truncated to 220 tokens; --max-length raises the limit" in capsys.readouterr().err


def test_data_in_the_current_folder_is_named_after_that_folder(run, shards, monkeypatch, capsys):
    monkeypatch.chdir(shards / "val")
    assert main(["evaluate", str(run), "--data", ".", "--limit", "2", "--overwrite", *QUICK]) == 0
    assert scores(run, "val")["data"] == [str(shards / "val")]
    assert not (run / "evaluation" / "scores.json").exists()
    assert main(["evaluate", str(run), "--data", "/", *QUICK]) == 2
    assert "no name can be derived from --data /: --name must be" in capsys.readouterr().err


def test_remote_data_keeps_its_address_and_its_pictures(run, shards, tmp_path, capsys):
    store = fsspec.filesystem("memory")
    store.put(str(shards / "val") + "/", "/films/remote", recursive=True)
    assert main(["evaluate", str(run), "--data", "memory://films/remote/", *QUICK]) == 0
    assert scores(run, "remote")["data"] == ["memory://films/remote/"]
    alone = shutil.copytree(run / "evaluation" / "remote", tmp_path / "run" / "evaluation" / "remote")
    assert main(["report", str(alone.parents[1]), "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "data:image/" in page and "could not be read from the shards" not in page


def other(split: str) -> Iterator[Record]:
    """Studies of another seed under the keys of the first seed's."""
    for record, twin in zip(records(3, 7, split), records(3, 0, split), strict=False):
        yield Record(twin.key, record.images, record.fields | {"id": twin.fields["id"]}, record.mask)


def test_equal_keys_in_two_folders_are_two_samples(run, shards, tmp_path):
    assert write_shards(other("val"), tmp_path / "other").refused == ()
    folders = [shards / "val", tmp_path / "other"]
    assert main(["evaluate", str(run), "--data", *map(str, folders), "--name", "both", *QUICK]) == 0
    rows = read_predictions(run / "evaluation" / "both" / "predictions.jsonl")
    first, second = (len(ShardIndex.open(folder)) for folder in folders)
    assert [row.folder for row in rows] == [0] * first + [1] * second
    assert len({row.key for row in rows}) < len(rows)
    alone = shutil.copytree(run / "evaluation" / "both", tmp_path / "run" / "evaluation" / "both")
    assert main(["report", str(alone.parents[1]), "--output", str(tmp_path / "r.html"), "--examples", "999"]) == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count("<article") == len(rows)
    assert page.count("<img") == 2 * page.count("<article") and "could not be read from the shards" not in page


@pytest.mark.parametrize("place", ["/proc/x/r.html", "FILE/r.html"])
def test_a_report_that_cannot_be_written_is_an_error(run, shards, tmp_path, place, capsys):
    assert main(["evaluate", str(run), "--data", str(shards / "val"), "--limit", "2", "--overwrite", *QUICK]) == 0
    (tmp_path / "FILE").touch()
    output = tmp_path / place
    assert main(["report", str(run), "--output", str(output)]) == 2
    assert f"--output {output} cannot be written" in capsys.readouterr().err


def test_export_has_no_option_without_effect(run, tmp_path):
    with pytest.raises(SystemExit):
        main(["export", str(run), "--output", str(tmp_path / "out"), "--max-new-tokens", "4"])


def interrupt_at(call: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the student's `generate` do something in its call number `call`, and then answer as always."""
    whole, calls = Student.generate, []

    def generate(self: Student, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == call:
            action()
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Student, "generate", generate)


def stop() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("call", ["open_student", "ask_probes"])
def test_a_signal_outside_of_the_answers_is_not_lost(run, shards, monkeypatch, call):
    """While the student is loaded, or after the answers: the work that follows ends after its first batch."""
    whole = getattr(evaluator, call)

    def signaled(*arguments, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        return whole(*arguments, **options)

    words = ["evaluate", str(run), "--data", str(shards / "val"), "--name", call, "--batch-size", "2", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(evaluator, call, signaled)
        assert main([*words, "--probes", "no-image"]) == 75
    assert (run / "evaluation" / call / "scores.json").exists() == (call == "ask_probes")
    assert main([*words, "--probes", "no-image"]) == 0
    assert scores(run, call)["probes"]["no-image"]["n"] > 0


@pytest.mark.parametrize(("action", "status", "whole_batches"), [(stop, 130, 3), (terminate, 143, 4)])
def test_an_interrupted_evaluation_is_resumed_and_equals_a_whole_one(
    run, shards, tmp_path, action, status, whole_batches, monkeypatch, capsys
):
    """The end comes in the fourth batch; two samples cannot be read."""
    assert write_shards(other("val"), tmp_path / "other").refused == ()
    damage(tmp_path / "other", (1, 3))
    samples = sum(len(ShardIndex.open(folder)) for folder in (shards / "val", tmp_path / "other"))
    words = ["evaluate", str(run), "--data", str(shards / "val"), str(tmp_path / "other"), "--batch-size", "5", *QUICK]
    words += ["--max-skip-fraction", "0.05", "--name"]
    assert main([*words, f"whole{status}"]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(4, action, patch)
        assert main([*words, f"parts{status}"]) == status
    shown = capsys.readouterr().err
    folder = run / "evaluation" / f"parts{status}"
    assert str(folder / ".predictions.jsonl.rank-*") in shown and "the same command resumes it" in shown
    assert "Traceback" not in shown and not (folder / "scores.json").exists()
    answered = batches_of(folder)
    assert [one["batch"] for one in answered] == list(range(whole_batches))
    with (folder / ".predictions.jsonl.rank-0").open("a") as file:
        file.write('{"batch": 4, "rows": [[0, 3, {"key": "half a li')
    assert main([*words, f"parts{status}"]) == 0
    done = sum(len(one["rows"]) + one["unreadable"] for one in answered)
    assert done == 5 * whole_batches
    assert f"resuming an interrupted evaluation after {done} of {samples} samples" in capsys.readouterr().err
    whole = run / "evaluation" / f"whole{status}"
    assert (folder / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    found, expected = (scores(run, f"{name}{status}") for name in ("parts", "whole"))
    for one in (found, expected):
        del one["name"], one["provenance"]["command"]
    assert found == expected and found["unreadable"] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.jsonl", "scores.json"]


def test_an_interrupted_evaluation_of_other_settings_is_not_resumed(run, shards, monkeypatch, capsys):
    words = [
        "evaluate",
        str(run),
        "--data",
        str(shards / "val"),
        "--name",
        "other",
        "--batch-size",
        "3",
        "--limit",
        "9",
    ]
    with monkeypatch.context() as patch:
        interrupt_at(3, stop, patch)
        assert main([*words, "--max-new-tokens", "3"]) == 130
    assert main([*words, *QUICK]) == 0
    shown = capsys.readouterr().err
    assert "an interrupted evaluation differs in max_new_tokens; starting again" in shown and "resuming" not in shown


def test_a_longer_evaluation_is_not_replaced_by_a_shorter_one(run, shards, monkeypatch, capsys):
    words = ["evaluate", str(run), "--data", str(shards / "val"), "--name", "long", *QUICK]
    assert main([*words, "--limit", "5"]) == 0 and main([*words, "--limit", "5"]) == 0
    before = (run / "evaluation/long/predictions.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("medalign.evaluator.open_student", None)
        assert main([*words, "--limit", "4"]) == 2
    assert "has the evaluation of 5 samples, and this one has only 4" in capsys.readouterr().err
    assert (run / "evaluation/long/predictions.jsonl").read_bytes() == before
    assert main([*words, "--limit", "4", "--overwrite"]) == 0 and scores(run, "long")["n"] == 4


def test_scores_name_what_they_were_measured_on(run, shards, capsys):
    words = ["evaluate", str(run), f"--data={shards / 'val'}", "--name", "origin", "--limit", "3", *QUICK]
    assert main(words) == 0
    path = run / "evaluation/origin/scores.json"
    before, found = path.read_bytes(), scores(run, "origin")["provenance"]
    folder = export.find_export(run)
    assert found["step"] == 8 and found["shards"] == [list(ShardIndex.open(shards / "val").fingerprint())]
    assert found["weights"] == {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    assert found["settings"]["limit"] == 3 and found["settings"]["max_length"] == 220
    command = f"medalign evaluate {run.name} --data=val --name origin --limit 3 --max-new-tokens 2"
    assert found["command"] == command and torch.__version__.startswith(found["versions"]["torch"])
    assert str(run.parent) not in json.dumps(found)
    assert main(["score", str(path.parent)]) == 0 and path.read_bytes() == before


class TestSeveralMethods:
    """Each method has an evaluation of its own, and the same command repeats none that is finished."""

    OWN = ("--decoding", "greedy", "tests.own_method:Biased", "--decoding.token=100")

    def test_a_sweep_continues_where_it_was_stopped(self, run, shards, capsys):
        words = ["evaluate", str(run), "--data", str(shards / "val"), "--name", "swept", "--limit", "4", *QUICK]
        assert main([*words, *self.OWN]) == 0
        shown = capsys.readouterr()
        assert re.search(r"swept\b(?!-).*swept-biased", shown.out, re.DOTALL)
        plain, biased = scores(run, "swept"), scores(run, "swept-biased")
        assert (plain["decoding"], biased["decoding"]) == ("greedy", "biased")
        settings = biased["provenance"]["settings"]
        assert settings["decoding.token"] == 100 and settings["decoding.bias"] == 100.0
        rows = read_predictions(run / "evaluation" / "swept-biased" / "predictions.jsonl")
        assert len({row.prediction for row in rows}) == 1, "the token does not depend on the sample"
        files = [run / "evaluation" / name / "scores.json" for name in ("swept", "swept-biased")]
        before = [file.stat().st_mtime_ns for file in files]
        files[1].unlink()  # as if it had been stopped before the second method
        assert main([*words, *self.OWN]) == 0
        assert "swept is already evaluated" in capsys.readouterr().err
        assert files[0].stat().st_mtime_ns == before[0] and files[1].is_file()
        assert main([*words, *self.OWN, "--batch-size=2"]) == 0  # another setting: both are repeated
        assert files[0].stat().st_mtime_ns > before[0]

    def test_a_student_that_a_method_refuses_is_not_read(self, run, shards, monkeypatch, capsys):
        monkeypatch.setattr(export, "load_export", None)
        words = ["evaluate", str(run), "--data", str(shards / "val"), "--decoding", "tests.own_method:Biased"]
        assert main([*words, "--decoding.token=999999"]) == 2
        assert "--decoding.biased.token is 999999, but the student has" in capsys.readouterr().err


def test_probes_are_asked_after_the_answers_and_resumed(run, shards, monkeypatch, capsys):
    """An evaluation gets probes later, is interrupted in one, and has the files of one that was asked at once."""
    words = ["evaluate", str(run), "--data", str(shards / "val"), "--batch-size", "5", "--limit", "12", *QUICK]
    probes = ["--probes", "blank", "caption", "pope-popular"]
    assert main([*words, "--name", "at-once", *probes]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^blank +\d+ +[\d.]+ +[\d.]+ +-?[\d.]+ +-?[\d.]+ to -?[\d.]+", table, re.MULTILINE)
    assert "blank, caption: 2 requests for reports left out" in table
    assert main([*words, "--name", "later"]) == 0
    folder, whole = run / "evaluation" / "later", run / "evaluation" / "at-once"
    with monkeypatch.context() as patch:
        interrupt_at(2, terminate, patch)  # the answers are kept, so this is the second batch of the first probe
        assert main([*words, "--name", "later", *probes]) == 143
    assert "is already evaluated" in capsys.readouterr().err
    assert not folder.joinpath("probe-blank.jsonl").exists() and "probes" not in scores(run, "later")
    assert main([*words, "--name", "later", *probes]) == 0
    assert "resuming an interrupted evaluation after 10 of" in capsys.readouterr().err
    files = ["predictions.jsonl", "probe-blank.jsonl", "probe-caption.jsonl", "probe-pope-popular.jsonl", "scores.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in files[:4])
    assert scores(run, "later")["probes"] == scores(run, "at-once")["probes"]
    true = {row.key: row for row in read_predictions(folder / "predictions.jsonl")}
    blank = read_predictions(folder / "probe-blank.jsonl")
    assert all(row.image == true[row.key].image and row.image_size == true[row.key].image_size for row in blank)
    before = (folder / "scores.json").read_bytes()
    assert main(["score", str(folder)]) == 0 and (folder / "scores.json").read_bytes() == before
    capsys.readouterr()
    with monkeypatch.context() as patch:
        interrupt_at(1, stop, patch)
        assert main([*words, "--name", "later", "--probes", "blank"]) == 0  # nothing is left to ask
    assert "probe blank of" in capsys.readouterr().err and (folder / "scores.json").read_bytes() == before
    assert main([*words, "--name", "later"]) == 0
    assert "removing its 3 probes" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.jsonl", "scores.json"]


def test_a_probe_that_the_data_do_not_allow_is_counted(run, tmp_path, capsys):
    def bare() -> Iterator[Record]:
        for record in records(2, 0, "val", reports=0.0):
            dropped = ("report", "findings")
            yield Record(record.key, record.images, {k: v for k, v in record.fields.items() if k not in dropped})

    assert write_shards(bare(), tmp_path / "bare").refused == ()
    words = ["evaluate", str(run), "--data", str(tmp_path / "bare"), "--limit", "1", *QUICK]
    assert main([*words, "--probes", "caption", "other"]) == 0
    found = scores(run, "bare")["probes"]
    assert found["caption"] == {"n": 0, "unreadable": 0, "not_asked": {"questions whose image has no report": 1}}
    assert found["other"]["not_asked"] == {"questions without another patient": 1}
    assert "probe caption: 0 questions (left out: 1 questions whose image has no report)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--probes", "mirror"])
    assert "invalid choice: 'mirror'" in capsys.readouterr().err
