"""The probes: what they ask, of which samples, and how the answers are scored."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from medalign import phantom
from medalign.data.samples.bad_sample import BadSample
from medalign.data.shards.index import ShardIndex
from medalign.errors import DataError
from medalign.evaluation.findings import chest_labeler
from medalign.evaluation.generation import digest
from medalign.evaluation.metrics import Prediction
from medalign.evaluation.probes.catalog import ASKED, CHANGED, PROBES
from medalign.evaluation.probes.knowledge import Evidence, Known, known_findings
from medalign.evaluation.probes.plan import Planner, _Pope, plan_of
from medalign.evaluation.probes.samples import GRAY, ProbeSamples, blank, shuffle
from medalign.evaluation.probes.scores import probe_scores, rejects
from medalign.geometry import PatchGrid

GRID = PatchGrid(8, 8)
LABELER = chest_labeler()
FINDINGS = ("nodule", "pleural effusion", "consolidation", "pneumothorax", "cardiomegaly")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("films")
    phantom.write_phantoms(folder, 1, 8, 0, reports=0.5)
    return ShardIndex.open(folder / "val")


@pytest.fixture(scope="module")
def rows(index: ShardIndex) -> list[Prediction]:
    """Answers of a system that repeats the references."""
    found = []
    for sample in map(index.read, range(len(index))):
        fields = (sample.key, sample.task, sample.question, sample.answer, sample.answer_type, sample.answer)
        found.append(Prediction(*fields, image=digest(sample.images), image_size=sample.images[0].size))
    return found


@pytest.fixture(scope="module")
def planner(index: ShardIndex, rows: list[Prediction]) -> Planner:
    return Planner([index], [len(index)], rows)


def samples_of(name: str, planner: Planner, index: ShardIndex) -> ProbeSamples:
    return ProbeSamples(name, planner.plan(name).folders[0], 0, [index], GRID)


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_condition_asks_the_same_questions(name, planner, index, rows):
    plan = planner.plan(name)
    assert plan_of({"folders": plan.folders, "not_asked": plan.not_asked}).digest == plan.digest
    assert plan.not_asked == {"requests for reports": 4}
    found = samples_of(name, planner, index)
    asked = [row for row in rows if row.task == "vqa"]
    assert len(found) == len(asked) == len(found.lengths(np.arange(len(found))))
    true = {row.key: row for row in asked}
    for sample in map(found.read, range(len(found))):
        row = true[sample.key]
        assert (sample.task, sample.answer, sample.boxes) == ("vqa", row.answer, ())
        if name == "no-question":
            assert sample.question == "" and digest(sample.images) == row.image
        elif name == "caption":
            report = index.read_fields(index.index_of_key(sample.key))["report"]
            assert sample.question == f"{report}\n{row.question}" and sample.images == ()
        else:
            assert sample.question == row.question
            assert len(sample.images) == (0 if name == "no-image" else 1)
            assert all(digest(sample.images) != row.image for _ in sample.images)


def test_the_other_image_is_each_image_once(planner, index, rows):
    found = samples_of("other", planner, index)
    shown = {sample.key.rpartition("-")[0]: digest(sample.images) for sample in map(found.read, range(len(found)))}
    assert sorted(shown.values()) == sorted({row.image for row in rows})


def test_the_other_image_is_of_another_patient(index, rows):
    images = list(dict.fromkeys(row.image for row in rows))
    patient = dict(zip(images, ["a", "a", "b", "", "b", "c", "a", "a"], strict=True))
    named = [Prediction(**{**vars(row), "patient": patient[row.image]}) for row in rows]
    entries = Planner([index], [len(index)], named).plan("other").folders[0]
    partner = {rows[place].image: rows[other[1]].image for place, other in entries}
    following = [2, 2, 3, 4, 5, 6, 2, 2]  # the last two images begin again, and the first two are of the same patient
    assert [images.index(partner[image]) for image in images] == following
    same = [Prediction(**{**vars(row), "patient": "a"}) for row in rows]
    plan = Planner([index], [len(index)], same).plan("other")
    assert plan.asked == 0 and "questions without another patient" in plan.not_asked


def test_questions_without_an_image_are_left_out(index, rows):
    bare = [Prediction(**{**vars(row), "image": ""}) for row in rows]
    planner = Planner([index], [len(index)], bare)
    assert all(planner.plan(name).asked == 0 for name in PROBES)


def test_a_caption_needs_a_report(index, rows, monkeypatch):
    monkeypatch.setattr(index, "read_fields", lambda i: {"task": "vqa", "question": "q?", "answer": "no"})
    plan = Planner([index], [len(index)], rows).plan("caption")
    assert plan.asked == 0 and set(plan.not_asked) == {"questions whose image has no report", "requests for reports"}
    samples = ProbeSamples("caption", [[1, [0, 1]]], 0, [index], GRID)
    with pytest.raises(BadSample, match="its report is gone; evaluate again"):
        samples.read(0)


@pytest.mark.parametrize("name", ["pope-random", "pope-popular", "pope-adversarial"])
def test_pope_asks_as_often_for_yes_as_for_no_and_knows_the_truth(name, planner, index):
    found = samples_of(name, planner, index)
    asked = [found.read(i) for i in range(len(found))]
    answers: dict[str, Counter[str]] = {}
    for sample in asked:
        case = index.read_fields(index.index_of_key(sample.key.rpartition("-")[0]))
        kinds = {LABELER.mentions(one["kind"])[0].finding for one in case["findings"]}
        assert sample.question == f"Is there {LABELER.lexicon.findings[sample.metadata['finding']].noun}?"
        assert (sample.metadata["finding"] in kinds) == (sample.answer == "yes") and sample.answer_type == "closed"
        answers.setdefault(case["case"], Counter())[sample.answer] += 1
    assert all(one["yes"] == one["no"] > 0 for one in answers.values()) and len(answers) >= 5
    assert len({sample.key for sample in asked}) == len(asked)
    left_out = planner.plan(name).not_asked["images without a finding that is known to be present"]
    assert len(answers) + left_out == 8
    assert "samples without an image" not in planner.plan(name).not_asked


@pytest.mark.parametrize("name", ["pope-random", "presupposed"])
def test_samples_without_an_image_are_said_to_be_left_out(name, index, rows):
    text_only = [replace(row, image="") for row in rows[:2]]
    plan = Planner([index], [len(index)], [*text_only, *rows[2:]]).plan(name)
    assert plan.not_asked["samples without an image"] == 2 and plan.asked


def test_popular_and_adversarial_rank_the_absent_findings():
    def known(*present: str) -> Known:
        return Known(present, tuple(name for name in FINDINGS if name not in present))

    images = [known("nodule"), known("nodule", "cardiomegaly"), known("pleural effusion", "cardiomegaly")]
    images += [known("nodule"), known("consolidation", "pneumothorax")]
    absent = {}
    for name in ("pope-popular", "pope-adversarial"):
        chosen = [_Pope(name, images)(one, str(i)) for i, one in enumerate(images)]
        absent[name] = [[finding for finding, answer in one if answer == "no"] for one in chosen]
    assert absent["pope-popular"][0] == ["cardiomegaly"]
    assert absent["pope-popular"][1][0] not in ("nodule", "cardiomegaly")
    assert absent["pope-popular"][2][0] == "nodule" and absent["pope-popular"][4] == ["nodule", "cardiomegaly"]
    assert absent["pope-adversarial"][0] == ["cardiomegaly"] and absent["pope-adversarial"][2][0] == "nodule"
    many = Known(FINDINGS[:4], ("edema", "pneumonia", "atelectasis", "fracture"))
    assert len(_Pope("pope-random", [many])(many, "x")) == 6  # POPE's three and three
    drawn = {tuple(_Pope("pope-random", images)(images[0], str(i))) for i in range(40)}
    assert len(drawn) == 4  # each of the absent findings


def test_a_presupposed_finding_is_absent_and_beside_it_one_is_present(planner, index):
    found = samples_of("presupposed", planner, index)
    for sample in map(found.read, range(len(found))):
        case = index.read_fields(index.index_of_key(sample.key.rpartition("-")[0]))
        kinds = {LABELER.mentions(one["kind"])[0].finding for one in case["findings"]}
        assert (sample.metadata["finding"] in kinds) == (sample.answer == "present")
        assert sample.question == LABELER.lexicon.findings[sample.metadata["finding"]].asked
    assert Counter(found.read(i).answer for i in range(len(found)))["none"] == 8


def evidence(*samples: dict) -> Evidence:
    found = Evidence()
    for fields in samples:
        found.add({"task": "vqa", **fields}, LABELER)
    return found


def test_annotations_are_complete_and_texts_are_not():
    images = [
        evidence({"findings": [{"kind": "nodule"}, "Pleural effusion"], "report": "No nodule. Pneumonia."}),
        evidence({"findings": ["no cardiomegaly", {"name": "Possible nodule"}]}),
        evidence({"task": "report", "report": "Left effusion. No nodule. Possible edema. Possible edema, no mass."}),
        evidence({"question": "Is there a nodule?", "answer": "No"}, {"question": "Cardiomegaly?", "answer": "yes"}),
        evidence({"question": "Is the heart size normal?", "answer": "no"}),
        evidence({"question": "Is there an effusion on the left?", "answer": "no"}),
        evidence({"question": "Is there a nodule or a mass?", "answer": "no"}, {"question": "q", "answer": "left"}),
        evidence({"question": "Is there a nodule?", "answer": "no", "report": "Nodule."}),
        evidence({"findings": [{"other": 1}, 3]}),
    ]
    assert known_findings(images, LABELER) == [
        Known(("nodule", "pleural effusion"), ()),
        Known((), ("pleural effusion",)),
        Known(("pleural effusion",), ("lung lesion", "nodule")),
        Known(("cardiomegaly",), ("nodule",)),
        Known(("cardiomegaly",), ()),
        Known((), ()),
        Known((), ()),
        Known(("nodule",), ()),
        Known((), ("nodule", "pleural effusion")),
    ]


def test_blank_keeps_size_and_mode():
    for mode in ("L", "RGB"):
        found = blank(Image.effect_noise((31, 17), 40).convert(mode))
        assert found.size == (31, 17) and found.mode == mode and set(np.asarray(found).flat) == {GRAY}


@pytest.mark.parametrize("size", [(64, 64), (67, 75), (9, 200), (5, 3)])
def test_shuffle_moves_whole_patches(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    found = np.asarray(shuffle(image, GRID))
    before = np.asarray(image)
    assert np.array_equal(found, np.asarray(shuffle(image.copy(), GRID))) and not np.array_equal(found, before)
    assert np.array_equal(np.sort(found.reshape(-1, 3), axis=0), np.sort(before.reshape(-1, 3), axis=0))
    if size == (67, 75):
        assert np.array_equal(found[72:], before[72:]) and np.array_equal(found[:, 64:], before[:, 64:])
        tiles = [array[:72, :64].reshape(8, 9, 8, 8, 3).swapaxes(1, 2).reshape(64, -1) for array in (found, before)]
        assert {one.tobytes() for one in tiles[0]} == {one.tobytes() for one in tiles[1]}


def answer(key: str, reference: str, prediction: str, **fields) -> Prediction:
    kind = "closed" if reference in ("yes", "no") else "open"
    return Prediction(key, "vqa", "q?", reference, kind, prediction, empty=not prediction, **fields)


def test_the_drop_is_that_of_the_same_questions_by_image():
    real = [answer("a", "yes", "yes", image="1"), answer("b", "no", "no", image="1")]
    real += [answer("c", "left", "left", image="2"), answer("d", "no", "no", image="2"), answer("e", "no", "yes")]
    probed = [answer("a", "yes", "yes"), answer("b", "no", "yes"), answer("c", "left", ""), answer("d", "no", "no")]
    found = probe_scores("blank", probed, real)
    assert (found["n"], found["images_n"], found["closed_n"], found["yes_no_n"]) == (4, 2, 3, 3)
    assert (found["accuracy"], found["accuracy_real"], found["accuracy_drop"]) == (0.5, 1.0, 0.5)
    assert found["accuracy_drop_low"] == found["accuracy_drop_high"] == 0.5  # half of each image
    assert found["closed_accuracy_drop"] == pytest.approx(1 / 3)
    assert (found["yes_share"], found["yes_share_real"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (found["same_share"], found["empty_share"]) == (0.5, 0.25)
    assert probe_scores("blank", [], real) == {"n": 0}
    with pytest.raises(DataError, match=r"probe blank have .*, but the predictions .* do not; .*--overwrite"):
        probe_scores("blank", probed, real[1:])


def test_scores_of_pope_by_hand():
    pairs = [("yes", "Yes."), ("no", "Yes, there is."), ("yes", "maybe"), ("no", "No.")]
    rows = [answer(str(i), *pair, image=str(i // 2)) for i, pair in enumerate(pairs)]
    found = probe_scores("pope-random", rows, [])
    assert (found["n"], found["images_n"], found["accuracy"]) == (4, 2, 0.5)
    assert found["accuracy_low"] == found["accuracy_high"] == 0.5
    assert (found["yes_share"], found["false_yes_of_no"], found["false_no_of_yes"]) == (0.5, 0.5, 0.0)
    assert found["unparseable"] == 0.25 and found["pope_accuracy"] == 0.75  # POPE's rule takes the rest as yes


@pytest.mark.parametrize(
    ("text", "rejected"),
    [
        ("none", True),
        ("There is no pneumothorax.", True),
        ("No, it is a nodule.", True),
        ("A pneumothorax is not seen.", True),
        ("not seen", True),
        ("There isn't one.", True),
        ("left", False),
        ("on the left side, with no effusion, a pneumothorax", False),
        ("", False),
        ("unknown", False),
        ("normal", False),
    ],
)
def test_an_answer_rejects_what_the_question_presupposes(text, rejected):
    assert rejects(text, "pneumothorax") is rejected


def test_scores_of_presupposed_findings():
    rows = [answer("a", "none", "left", finding="nodule"), answer("b", "none", "No nodule.", finding="nodule")]
    rows += [answer("c", "present", "none", finding="edema")]
    found = probe_scores("presupposed", rows, [])
    assert (found["n"], found["accuracy"], found["present_n"], found["rejected_of_present"]) == (2, 0.5, 1, 1.0)
    assert "accuracy" not in probe_scores("presupposed", rows[2:], [])


def test_every_probe_has_a_line_of_help_and_a_score(planner):
    assert set(PROBES) == set(CHANGED) | set(ASKED) and len(PROBES) == 10
    assert all(planner.plan(name).asked for name in PROBES)
