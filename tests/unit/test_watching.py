"""`medalign watch`: the newest metrics of runs in a table."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from medalign import config as settings
from medalign import watching
from medalign.cli.main import main
from medalign.config import Config
from medalign.observability.rows import JsonlSink
from medalign.run_folder import RunFolder

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def write_run(folder: Path, rows: dict[int, dict[str, float]], steps: int | None = 100) -> Path:
    folder.mkdir(parents=True)
    sink = JsonlSink(RunFolder(folder).metrics, clock=lambda: NOON)
    for step, values in rows.items():
        sink.log(step, values)
    sink.close()
    config = Config()
    config.student.path = config.teacher.path = "models"
    config.data.train = "shards"
    config.train.steps, config.train.epochs = (steps, None) if steps else (None, 2.0)
    RunFolder(folder).config.write_text(settings.dump(config))
    return folder


def draw(paths: list[Path], prefixes: tuple[str, ...] = (), later: float = 90) -> str:
    runs = watching._open(paths)
    for run in runs:
        run.refresh()
    console = Console(file=io.StringIO(), width=160)
    console.print(watching.table(runs, prefixes, NOON + timedelta(seconds=later)))
    return console.file.getvalue()


def lines(text: str) -> dict[str, list[str]]:
    """The cells of each line of the table by its name."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_two_runs_are_beside_each_other(tmp_path):
    row = {"loss/total": 1.23456, "optim/lr": 2e-4, "time/elapsed_seconds": 50.0}
    first = write_run(tmp_path / "first", {10: {"loss/total": 9.0}, 20: row})
    second = write_run(tmp_path / "second", {40: {"loss/total": 0.5, "loss/extra": 3.0}})
    found = lines(draw([first, second]))
    assert found["first"] == ["second"]  # the line of the titles
    assert found["step"] == ["20/100", "40/100"]
    assert found["last row"] == ["1:30 ago", "1:30 ago"]
    assert found["elapsed"] == ["0:50", "-"]
    assert found["left"] == ["3:20", "-"]  # 80 steps at 2.5 s
    assert found["loss/total"] == ["1.235", "0.5"]
    assert found["optim/lr"] == ["0.0002", "-"]
    assert found["loss/extra"] == ["-", "3"]
    assert list(found).index("loss/extra") < list(found).index("optim/lr")  # groups stay together


@pytest.mark.parametrize(("width", "tables"), [(40, 3), (60, 2), (100, 1)])
def test_runs_that_do_not_fit_are_below_each_other(tmp_path, width, tables):
    """No name is cut, so that two metrics cannot look the same."""
    row = {"speed/samples_per_second": 12.5, "speed/tokens_per_second": 12.5}
    paths = [write_run(tmp_path / f"seed-{seed}-medalign", {20: row}) for seed in range(3)]
    console = Console(file=io.StringIO(), width=width)
    watching.watch(paths, console, once=True)
    text = console.file.getvalue()
    assert text.count("speed/samples_per_second") == text.count("speed/tokens_per_second") == tables
    assert text.count("12.5") == 6 and "…" not in text
    assert all(len(line) <= width for line in text.splitlines())


def test_rows_of_other_metrics_do_not_hide_a_value(tmp_path):
    run = write_run(tmp_path / "run", {10: {"loss/total": 1.0}, 20: {"validation/loss/total": 2.0}})
    found = lines(draw([run]))
    assert (found["loss/total"], found["validation/loss/total"], found["step"]) == (["1"], ["2"], ["20/100"])


def test_only_the_wanted_metrics(tmp_path):
    run = write_run(tmp_path / "run", {10: {"loss/total": 1.0, "optim/lr": 1.0}})
    assert "optim/lr" not in draw([run], ("loss/",))


def test_a_value_that_is_not_finite_is_named(tmp_path):
    run = write_run(tmp_path / "run", {10: {"loss/total": float("nan")}})
    assert lines(draw([run]))["loss/total"] == ["not finite"]


@pytest.mark.parametrize("tail", [b'{"step": 30, "loss', b"\0\0\0\0"])
def test_a_torn_end_is_left_out(tmp_path, tail):
    run = write_run(tmp_path / "run", {20: {"loss/total": 1.0}})
    with RunFolder(run).metrics.open("ab") as file:
        file.write(tail)
    assert lines(draw([run]))["step"] == ["20/100"]


def test_a_damaged_line_is_reported_and_the_other_run_is_shown(tmp_path):
    damaged, whole = write_run(tmp_path / "damaged", {}), write_run(tmp_path / "whole", {20: {"loss/total": 1.0}})
    RunFolder(damaged).metrics.write_text('nothing\n{"step": 10}\n')
    text = draw([damaged, whole])
    assert lines(text)["step"] == ["-", "20/100"]
    assert "line 1" in text and "remove the" in text


def test_a_run_without_rows_and_one_without_metrics(tmp_path):
    (tmp_path / "new").mkdir()
    empty = write_run(tmp_path / "empty", {})
    assert lines(draw([tmp_path / "new", empty]))["note"] == ["no row yet", "no row yet"]


def test_settings_that_cannot_be_read_or_count_epochs_leave_out_the_total(tmp_path):
    epochs = write_run(tmp_path / "epochs", {20: {}}, steps=None)
    torn = write_run(tmp_path / "torn", {20: {}})
    RunFolder(torn).config.write_text("train: {steps: [")
    assert lines(draw([epochs, torn]))["step"] == ["20", "20"]


def test_rows_from_before_the_time_was_logged(tmp_path):
    run = write_run(tmp_path / "run", {})
    RunFolder(run).metrics.write_text('{"step": 10, "loss/total": 1.0}\n')
    found = lines(draw([run]))
    assert (found["step"], found["last row"]) == (["10/100"], ["-"])


def test_runs_with_the_same_name_are_told_apart_by_their_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a long path is folded, wherever that is
    paths = [write_run(Path(name, "run"), {10: {}}) for name in "ab"]
    text = draw(paths)
    assert "a/run" in text and "b/run" in text


def append(run: Path, step: int) -> None:
    with RunFolder(run).metrics.open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_new_rows_are_shown_until_an_interrupt(tmp_path, terminal):
    run = write_run(tmp_path / "run", {10: {}})
    pauses = iter([lambda: append(run, 20), lambda: None, lambda: append(run, 30)])

    def sleep(seconds: float) -> None:
        assert seconds == 3.0
        next(pauses, interrupt)()

    def interrupt() -> None:
        raise KeyboardInterrupt

    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    watching.watch([run], console, interval=3.0, sleep=sleep)
    shown = console.file.getvalue()
    assert [f"{step}/100" in shown for step in (10, 20, 30)] == [True] * 3
    assert ("\x1b[" in shown) == terminal
    if not terminal:  # written again only when there are new rows
        assert shown.count("step") == 3


def test_once_prints_plain_text_without_a_terminal(tmp_path, capsys):
    run = write_run(tmp_path / "run", {20: {"loss/total": 1.0}})
    assert main(["watch", str(run), "--once"]) == 0
    out = capsys.readouterr().out
    assert lines(out)["step"] == ["20/100"] and "\x1b" not in out


def test_a_folder_that_does_not_exist_is_an_error(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "nothing"), "--once"]) == 2
    assert "nothing does not exist; give the --run.dir of a training" in capsys.readouterr().err
