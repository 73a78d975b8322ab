"""Whether the attention follows the question, on constructed maps."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from medalign.__main__ import main
from medalign.errors import DataError
from medalign.evaluation.metrics import Prediction, score, write_predictions
from medalign.evaluation.metrics.conditional import conditional
from medalign.evaluation.scores_file import format_scores
from medalign.geometry import PatchGrid

GRID = PatchGrid(4, 4)
SIDE = 64  # pixels, so that patches are 16 x 16
UNIFORM = np.ones(16)


def box(patch: int) -> list[float]:
    row, column = divmod(patch, 4)
    return [16.0 * column, 16.0 * row, 16.0 * column + 16, 16.0 * row + 16]


def asked(film: str, patches: Sequence[int], map_N: np.ndarray, question: str = "Is it?", **more) -> Prediction:
    """A question whose boxes are these patches, and its map."""
    row = Prediction(f"{film}-{question}-{patches}-{more}", "vqa", question, "yes", "closed", "yes", image=film)
    row.boxes, row.attention, row.image_size = [box(patch) for patch in patches], map_N.tolist(), (SIDE, SIDE)
    for name, value in more.items():
        setattr(row, name, value)
    return row


def at(*patches: int, weight: float = 3.0) -> np.ndarray:
    map_N = np.zeros(16)
    map_N[list(patches)] = weight  # any scale
    return map_N


def test_a_map_that_follows_the_question():
    found = conditional([asked("a", [0], at(0)), asked("a", [9], at(9))], GRID)
    assert found["conditional_n"] == 1
    assert (found["asked_denser"], found["asked_denser_chance"]) == (1.0, 0.5)
    assert (found["asked_pointing"], found["other_pointing"], found["map_change"]) == (1.0, 0.0, 1.0)
    assert "map_change_same" not in found  # no two questions with equal boxes


def test_a_map_that_looks_at_the_other_finding():
    found = conditional([asked("a", [0], at(9)), asked("a", [9], at(0))], GRID)
    assert (found["asked_denser"], found["asked_pointing"], found["other_pointing"]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_a_map_that_does_not_know_the_question_scores_chance(seed):
    """Also where one finding is asked about more often than the other, and the map is concentrated on it."""
    map_N = np.random.default_rng(seed).gamma(0.3, size=16) + at(0, weight=5.0 * (seed % 2))
    rows = [asked("a", [0], map_N, question) for question in ("Is it?", "Where?", "Which?")]
    found = conditional([*rows, asked("a", [9], map_N), asked("a", [5, 6], map_N)], GRID)
    assert found["asked_denser"] == 0.5
    assert found["asked_pointing"] == pytest.approx(found["other_pointing"])
    assert found["map_change"] == found["map_change_same"] == 0


def test_density_and_not_mass_is_compared():
    """A large box does not win because it is large: uniform attention is a tie."""
    found = conditional([asked("a", [0, 1, 2, 3], UNIFORM), asked("a", [9], UNIFORM)], GRID)
    assert found["asked_denser"] == 0.5
    lean = UNIFORM + at(9, weight=0.5)
    assert conditional([asked("a", [0, 1, 2, 3], lean), asked("a", [9], lean)], GRID)["asked_denser"] == 0.5
    follows = [asked("a", [0, 1, 2, 3], UNIFORM + at(0, weight=0.1)), asked("a", [9], lean)]
    assert conditional(follows, GRID)["asked_denser"] == 1.0


def test_the_change_that_is_due_to_the_words_is_apart():
    rows = [asked("a", [0], at(0, 1), "Is it?"), asked("a", [0], at(1, 2), "Where?"), asked("a", [9], at(9), "Is it?")]
    found = conditional(rows, GRID)
    assert found["map_change"] == 1.0 and found["map_change_same"] == pytest.approx(0.5)
    repeated = [asked("a", [0], at(0), folder=0), asked("a", [0], at(5), folder=0)]  # the same question twice
    assert "map_change_same" not in conditional(repeated, GRID)


@pytest.mark.parametrize(
    "rows",
    [
        [asked("a", [0], at(0)), asked("b", [9], at(9))],  # two films
        [asked("a", [0], at(0)), asked("a", [9], at(9), folder=1)],  # of two data sets
        [asked("a", [0], at(0)), asked("a", [0, 9], at(9))],  # a box in common
        [asked("a", [0], at(0)), asked("a", [9], at(9), task="report")],
        [asked("a", [0], at(0)), asked("a", [], at(9))],  # nothing to look at
        [asked("a", [0], at(0)), asked("a", [9], np.zeros(16))],
        [asked("a", [0], at(0)), asked("a", [9], at(9), attention=None)],
        [asked("", [0], at(0)), asked("", [9], at(9))],  # which film is not known
    ],
)
def test_questions_that_are_not_a_pair(rows):
    assert conditional(rows, GRID) == {"conditional_n": 0}


def test_each_film_counts_once():
    right = [asked("a", [patch], at(patch), f"{patch}?") for patch in (0, 3, 5, 9)]  # 12 cases
    wrong = [asked("b", [0], at(9)), asked("b", [9], at(0))]  # 2 cases
    found = conditional([*right, *wrong], GRID)
    assert found["conditional_n"] == 2 and found["asked_denser"] == 0.5
    assert (found["asked_denser_low"], found["asked_denser_high"]) == (0.0, 1.0)


def test_attention_to_padding_is_removed():
    wide = (64, 32)  # rows 0 and 3 of the grid are padding, so patch 5 of the grid is at the top
    boxes = {5: [[16.0, 0.0, 32.0, 16.0]], 6: [[32.0, 0.0, 48.0, 16.0]]}
    rows = [
        asked("a", [patch], at(patch) + at(0, weight=100.0), boxes=boxes[patch], image_size=wide) for patch in boxes
    ]
    found = conditional(rows, GRID)
    assert (found["asked_pointing"], found["other_pointing"], found["map_change"]) == (1.0, 0.0, 1.0)


def test_attention_of_another_grid_is_refused():
    with pytest.raises(DataError, match=r"prediction 'a-.*attention has shape \(16,\), but the grid is 8 x 8"):
        conditional([asked("a", [0], at(0))], PatchGrid(8, 8))


def test_scores_from_the_file_are_the_same_to_the_last_bit(tmp_path, capsys):
    """The file has fewer digits than the attention, and a tie must not depend on them."""
    draw = np.random.default_rng(0)
    rows = [asked(f"f{film}", [patch], draw.random(16), f"{patch}?") for film in range(6) for patch in (0, 5, 9)]
    folder = tmp_path / "run" / "evaluation" / "val"
    write_predictions(folder / "predictions.jsonl", rows)
    before = format_scores(rows, {"grid": [4, 4], "samples": len(rows)})
    (folder / "scores.json").write_text(before)
    assert main(["score", str(folder)]) == 0 and (folder / "scores.json").read_text() == before
    scores = json.loads(before)
    shown = capsys.readouterr().out.splitlines()
    assert "asked denser" in shown[0] and "map change" in shown[0]
    assert f"{100 * scores['asked_denser']:.1f}" in shown[2] and shown[3].startswith("(chance)")
    assert "50.0" in shown[3] and f"{100 * scores['other_pointing']:.1f}" in shown[3]
    assert "conditional_n" not in score(rows)  # the grid is not known


def test_each_run_has_its_chance_beside_its_score(tmp_path, capsys):
    for name, maps in (("follows", (at(0), at(9))), ("blind", (at(0), at(0)))):
        folder = tmp_path / name
        rows = [asked("a", [0], maps[0]), asked("a", [9], maps[1])]
        write_predictions(folder / "predictions.jsonl", rows)
        (folder / "scores.json").write_text(format_scores(rows, {"grid": [4, 4], "samples": 2}))
    assert main(["score", str(tmp_path / "follows"), str(tmp_path / "blind")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "*100.0 (0.0)" in lines[2] and "50.0 (50.0)" in lines[3]
    assert lines[2].split()[-1] == "100.0" and lines[3].split()[-1] == "0.0"  # a change has no best
