"""The commands after training: evaluate, generate, report, export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from medalign.__main__ import main
from medalign.checkpoint import export
from medalign.errors import CheckpointError, ConfigError
from medalign.inference import open_student
from tests.e2e.conftest import train


@pytest.fixture(scope="module")
def evaluated(trained: Path, shards: Path) -> Path:
    assert main(["evaluate", str(trained), "--data", str(shards / "val"), "--max-new-tokens", "8"]) == 0
    return trained


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.png"
    Image.linear_gradient("L").resize((90, 60)).save(path)
    return path


def test_evaluate_writes_predictions_and_scores(evaluated, shards):
    folder = evaluated / "evaluation" / "val"
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    index = (shards / "val" / "index.jsonl").read_text().splitlines()
    assert len(rows) == len(index) - 1
    assert {"vqa", "report"} == {row["task"] for row in rows}
    grounded = [row for row in rows if row["boxes"]]
    assert grounded and all(0 <= row["attention_inside"] <= 1 and len(row["attention"]) == 16 for row in grounded)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["grid"] == [4, 4] and scores["unreadable"] == 0


def test_the_report_is_self_contained(evaluated, tmp_path):
    page = tmp_path / "report.html"
    assert main(["report", str(evaluated), "--output", str(page), "--examples", "2"]) == 0
    text = page.read_text()
    assert "data:image/" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text), "the report would load something from elsewhere"


def test_generate_answers_and_draws(trained, film, tmp_path, capsys):
    overlay = tmp_path / "map.png"
    words = ["generate", str(trained), "--image", str(film), "--question", "Is there an effusion?"]
    assert main([*words, "--overlay", str(overlay), "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")
    width, height = Image.open(overlay).size
    assert abs(width - 1.5 * height) <= 1.5  # each side is rounded to whole pixels


def test_a_file_of_questions_is_answered_as_one_by_one(trained, film, tmp_path, capsys):
    """In the order of the file, with the reference if the question has one."""
    asked = ["Is there an effusion?", "Where is the nodule? Name the side and the zone.", "What is a nodule?"]
    rows = [{"id": f"q{i}", "image": film.name, "question": text} for i, text in enumerate(asked)]
    rows[1] |= {"answer": "left", "answer_type": "Open", "patient": "p1"}
    rows[2]["image"] = None
    rows.append({"id": "lost", "image": "lost.png", "question": "Is it there?"})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, quick = tmp_path / "answers.jsonl", ["--max-new-tokens", "6"]
    words = ["generate", str(trained), "--input", str(tmp_path / "questions.jsonl"), "--output", str(output), *quick]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert "1 of 4 samples could not be used, more than --max-skip-fraction 0.0" in shown and "lost.png" in shown
    assert main([*words, "--max-skip-fraction", "0.1"]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["key"] for row in found] == ["q0", "q1", "q2"]
    assert [row.get("answer") for row in found] == [None, "left", None] and found[1]["patient"] == "p1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "film.png", "questions.jsonl"]
    capsys.readouterr()
    for row, text in zip(found[:2], asked, strict=False):
        assert main(["generate", str(trained), "--image", str(film), "--question", text, *quick]) == 0
        assert capsys.readouterr().out == row["prediction"] + "\n"
    assert main(words) == 2 and f"--output {output} already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--input is missing; give --image, --question, --overlay, or --input, --output"),
        (["--input", "q.jsonl"], "--output is missing"),
        (["--question", "q"], "--image is missing"),
        (["--question", "q", "--input", "q.jsonl"], "--question and --input exclude each other"),
        (["--image", "a.png", "--question", "q", "--top-p", "0.5"], "--top-p 0.5 has no effect without --do-sample"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, words, message, capsys):
    assert main(["generate", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_an_export_answers_like_its_run(trained, film, tmp_path, capsys):
    """The export includes W: the exported student gives the same answer, and W is not zero."""
    folder = tmp_path / "export"
    assert main(["export", str(trained), "--output", str(folder)]) == 0
    question = ["--image", str(film), "--question", "Where is the nodule?", "--max-new-tokens", "12"]
    assert main(["generate", str(trained), *question]) == 0
    from_run = capsys.readouterr().out
    assert main(["generate", str(folder), *question]) == 0
    assert capsys.readouterr().out == from_run
    student, _, _ = open_student(folder)
    assert student.steering.weight.abs().max() > 0
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_merging_is_refused_for_a_student_with_w(trained, tmp_path):
    with pytest.raises(ConfigError, match="steering"):
        export.merge(export.find_export(trained), tmp_path / "merged")


def test_a_merged_folder_is_the_same_model(recipe, tmp_path):
    """Logits of the merged folder against base and adapters: float32 products in another order differ by 1e-4."""
    from tests import tiny

    run, folder = tmp_path / "plain", tmp_path / "merged"
    train(recipe, run, "--student.steering", "false", "--train.steps", "4", "--log.wandb", "off")
    assert main(["export", str(run), "--output", str(folder), "--merge"]) == 0
    student, _, _ = open_student(run)
    batch = tiny.batch(texts=((5, 4), (5, 4)))
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        ours = student(batch)
        logits = plain(input_ids=batch.input_ids, pixel_values=batch.student_pixels).logits[:, ours.kept]
    torch.testing.assert_close(ours.logits, logits, rtol=1e-4, atol=1e-4)


def test_an_export_that_does_not_fit_is_refused(trained, tmp_path):
    folder = tmp_path / "export"
    export.copy(export.find_export(trained), folder)
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors"):
        open_student(folder)


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    assert main(["evaluate", str(tmp_path), "--data", str(tmp_path)]) == 2
    with pytest.raises(CheckpointError, match="contains no trained student"):
        export.find_export(tmp_path)
    with pytest.raises(CheckpointError, match="lost does not exist; give the folder of a run"):
        export.find_export(tmp_path / "lost")
