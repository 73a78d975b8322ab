from collections import defaultdict
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from medalign.__main__ import main
from medalign.phantom import KINDS, SPLITS, Study, stream, study
from medalign.phantom.records import REQUESTS, records, write_phantoms

SEED = 7


@cache
def studies() -> tuple[Study, ...]:
    return tuple(study(SEED, index) for index in range(600))


def test_a_study_depends_only_on_seed_and_index():
    once, again, other = study(3, 5), study(3, 5), study(3, 6)
    assert once.image.tobytes() == again.image.tobytes()
    assert (once.report, once.questions) == (again.report, again.questions)
    assert once.image.tobytes() != other.image.tobytes()


def test_films_are_gray_small_and_not_all_square():
    sizes = {item.image.size for item in studies()}
    assert all(item.image.mode == "L" and 96 <= max(item.image.size) <= 128 for item in studies())
    assert any(w > h for w, h in sizes) and any(w < h for w, h in sizes) and any(w == h for w, h in sizes)


def test_boxes_are_the_tightest_around_the_masks():
    for item in studies():
        width, height = item.image.size
        for found in item.findings:
            x0, y0, x1, y1 = found.box
            assert found.mask.shape == (height, width) and found.mask.dtype == bool
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            rows, columns = found.mask.any(1).nonzero()[0], found.mask.any(0).nonzero()[0]
            assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == found.box


def test_counts_and_kinds():
    counts = [len(item.findings) for item in studies()]
    assert set(counts) == {0, 1, 2, 3}
    assert {found.kind for item in studies() for found in item.findings} == set(KINDS)
    for item in studies():
        for a, b in combinations(item.findings, 2):
            assert (a.kind, a.side) != (b.kind, b.side)
            assert not a.side or (a.side, a.zone) != (b.side, b.zone)


def test_the_patients_right_is_on_the_left_of_the_picture():
    for item in studies():
        for found in item.findings:
            middle = 0.5 * (found.box[0] + found.box[2]) / item.image.width
            if found.side:
                # The midline is drawn between 0.46 and 0.54, and the chest may be tilted.
                assert abs(middle - 0.5) < 0.05 or (middle < 0.5) == (found.side == "right")


@pytest.mark.parametrize(("kind", "sign"), [("nodule", 1), ("consolidation", 1), ("effusion", 1), ("pneumothorax", -1)])
def test_findings_change_the_film_against_the_other_lung(kind, sign):
    """The mirrored mask covers the other lung; over many studies the mean difference has the expected sign."""
    differences = []
    for item in studies():
        film = np.asarray(item.image, dtype=float)
        for found in item.findings:
            if found.kind == kind and len(item.findings) == 1:
                differences.append(film[found.mask].mean() - film[found.mask[:, ::-1]].mean())
    assert sign * np.mean(differences) > 10


def test_reports_mention_every_finding():
    words = {"cardiomegaly": ("enlarged", "cardiomegaly", "Enlarged")}
    for item in studies():
        for found in item.findings:
            assert any(word in item.report for word in words.get(found.kind, (found.kind,)))
            assert found.side in item.report and (found.kind == "cardiomegaly" or found.size in item.report.lower())
    assert len({item.report for item in studies()}) > 300


def test_question_boxes_belong_to_findings_and_negative_answers_have_none():
    for item in studies():
        boxes = {found.box for found in item.findings}
        for asked in item.questions:
            assert set(asked.boxes) <= boxes
            if asked.answer_type == "open":
                assert bool(asked.boxes) == (asked.answer != "none")
            elif "normal" not in asked.question:
                assert bool(asked.boxes) == (asked.answer == "yes")
            else:
                assert bool(asked.boxes) == (asked.answer == "no")
    assert 4.2 < np.mean([len(item.questions) for item in studies()]) < 5.6


def test_closed_questions_cannot_be_answered_without_looking():
    answers = defaultdict(list)
    for item in (study(SEED + 1, index) for index in range(1500)):
        for asked in item.questions:
            if asked.answer_type == "closed":
                answers[asked.question].append(asked.answer == "yes")
    overall = np.concatenate([np.array(given) for given in answers.values()])
    assert abs(overall.mean() - 0.5) < 3 * np.sqrt(0.25 / len(overall))  # three standard errors of a fair coin
    for question, given in answers.items():
        # Four standard errors, because the largest deviation of many questions is expected near three.
        assert abs(np.mean(given) - 0.5) < 4 * np.sqrt(0.25 / len(given)), question


def test_open_answers_are_right():
    for item in studies():
        for asked in item.questions:
            if asked.question.startswith("Where"):
                (found,) = [found for found in item.findings if found.box in asked.boxes]
                assert asked.answer == f"{found.side} {found.zone} zone"


def test_no_two_streams_share_studies():
    streams = {stream(seed, split) for seed in range(50) for split in SPLITS}
    assert len(streams) == 50 * len(SPLITS)
    with pytest.raises(ValueError, match="tuple"):
        stream(0, "holdout")


def test_records_have_the_documented_fields():
    written = list(records(5, 0, "train"))
    assert len({record.key for record in written}) == len(written)
    assert sum(record.fields["task"] == "report" for record in written) == 5
    for record in written:
        fields = record.fields
        assert fields["id"] == record.key and fields["split"] == "train" and fields["case"] in record.key
        assert bool(record.mask) == bool(fields["boxes"])
        if fields["task"] == "report":
            assert fields["answer"] == fields["report"] and fields["question"] in REQUESTS


def test_a_share_of_the_studies_has_its_report_and_all_keep_their_questions():
    every, some = (list(records(8, 0, "train", share)) for share in (1.0, 0.25))
    asked = [[record.key for record in made if record.fields["task"] == "vqa"] for made in (every, some)]
    assert asked[0] == asked[1]
    assert (len(every) - len(asked[0]), len(some) - len(asked[1])) == (8, 2)


def test_every_record_can_be_packed_and_no_film_is_in_both_splits(tmp_path):
    reports = write_phantoms(tmp_path, train=6, val=4, seed=1)
    assert set(reports) == {"train", "val"} and not any(report.refused for report in reports.values())
    assert reports["train"].written == len(list(records(6, 1, "train")))
    films = [{record.images for record in records(6, 1, split)} for split in ("train", "val")]
    assert not films[0] & films[1]


def test_numbers_out_of_range_are_refused(capsys):
    for words, message in (
        (["--train", "many"], "argument --train: 'many' is not a whole number of at least 1"),
        (["--val", "0"], "argument --val: '0' is not a whole number of at least 1"),
        (["--reports", "2"], "'2' is not a number from 0 to 1"),
        (["--reports", "half"], "'half' is not a number from 0 to 1"),
    ):
        with pytest.raises(SystemExit):
            main(["phantom", "--output", "x", *words])
        assert message in capsys.readouterr().err
