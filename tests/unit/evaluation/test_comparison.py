"""Comparisons of systems: intervals, tests, arms on disk, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from scipy import stats

from medalign.__main__ import main
from medalign.evaluation.comparison import compare, format_comparisons, read_arm
from medalign.evaluation.comparison.arms import parse_word
from medalign.evaluation.comparison.measures import MEASURES
from medalign.evaluation.comparison.resampling import (
    cluster_bootstrap,
    cluster_permutation,
    holm,
    mcnemar,
    seed_interval,
    sign_flip,
)
from medalign.evaluation.metrics import Prediction, score, write_predictions


def mean(sums_RK: np.ndarray) -> np.ndarray:
    return sums_RK[:, 0] / sums_RK[:, 1]


def sums(values_CQ: np.ndarray) -> np.ndarray:
    """Sum and count of each cluster."""
    return np.stack([values_CQ.sum(1), np.full(len(values_CQ), float(values_CQ.shape[1]))], 1)


def simulate(draw: np.random.Generator, clusters: int = 60, questions: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers of two systems whose true difference is 0, because both share one distribution."""
    skill_2c = 1 / (1 + np.exp(-1.5 * draw.standard_normal((2, clusters))))
    a_CQ, b_CQ = (draw.random((2, clusters, questions)) < skill_2c[:, :, None]).astype(np.float64)
    return a_CQ, b_CQ


def test_intervals_by_cluster_cover_the_true_difference():
    """Intervals by cluster cover in about 95 % of data sets, and those by answer in fewer.

    The coverage of 400 data sets has a Monte Carlo error of 1.1 points. Quantiles of the bootstrap are too narrow by
    about half a point with 60 clusters: three errors around 94.5 % are 91 to 98 %. The variance of a mean of 5 answers
    whose correlation is 0.27 is 1 + 4 * 0.27 = 2.1 times that of independent answers: an interval that takes them as
    independent covers with the probability of |z| < 1.96 / 1.44, 83 %, and at most in 88 % with three errors.
    """
    draw = np.random.default_rng(3)
    by_cluster, by_answer = 0, 0
    for _ in range(400):
        a_CQ, b_CQ = simulate(draw)
        low, high = cluster_bootstrap(sums(a_CQ), sums(b_CQ), mean)
        by_cluster += low <= 0 <= high
        changes = (b_CQ - a_CQ).ravel()
        by_answer += abs(changes.mean()) <= 1.96 * changes.std(ddof=1) / changes.size**0.5
    assert 0.91 <= by_cluster / 400 <= 0.98
    assert by_answer / 400 <= 0.88


def test_the_permutation_test_rejects_at_its_level():
    """Two systems of one distribution, 300 times: p is uniform, with Monte Carlo errors of 1.3 and 2.9 points."""
    draw = np.random.default_rng(5)
    p_values = [cluster_permutation(*map(sums, draw.standard_normal((2, 10, 4))), mean) for _ in range(300)]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=3 * 0.013)
    assert np.mean(np.array(p_values) < 0.5) == pytest.approx(0.5, abs=3 * 0.029)


@pytest.mark.parametrize("count", [9, 30])
def test_permutation_equals_scipy_on_single_samples(count):
    """Both try the 512 swaps of 9 samples, and draw those of 30.

    The p-values of 10,000 draws differ by a standard error of at most 0.5 * sqrt(2 / 10000) = 0.007.
    """
    draw = np.random.default_rng(count)
    a = draw.random(count)
    b = a + 0.05 + 0.2 * draw.standard_normal(count)
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(y) - np.mean(x), permutation_type="samples", n_resamples=9999, rng=1
    ).pvalue
    found = cluster_permutation(sums(a[:, None]), sums(b[:, None]), mean)
    assert found == pytest.approx(expected, abs=1e-12 if count == 9 else 0.021)
    assert 0.001 < found < 0.9


def test_mcnemar_by_hand():
    """10 discordant pairs, 8:2: twice the binomial tail (1 + 10 + 45) / 1024."""
    a = [1.0] * 2 + [0.0] * 8 + [1.0] * 5 + [0.0] * 5
    b = [0.0] * 2 + [1.0] * 8 + [1.0] * 5 + [0.0] * 5
    assert mcnemar(a, b) == (2, 8, pytest.approx(2 * sum(comb(10, k) for k in range(3)) / 2**10))
    assert mcnemar(a, a) == (0, 0, 1.0)


def test_holm_by_hand():
    """Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which may not be below its predecessor."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([0.3]) == [0.3] and holm([]) == []


def test_seeds_equal_scipys_paired_t_test():
    a, b = np.array([50.0, 52.0, 49.5, 51.0]), np.array([53.0, 52.5, 54.0, 52.0])
    low, high, p = seed_interval((b - a).tolist())
    expected = stats.ttest_rel(b, a)
    interval = expected.confidence_interval()
    assert (low, high, p) == pytest.approx((interval.low, interval.high, expected.pvalue))
    assert sign_flip(b - a) == 2 / 16  # all four have one sign: 2 of the 16 patterns are as extreme
    assert seed_interval([0.0, 0.0]) == (0.0, 0.0, 1.0)
    assert seed_interval([0.2, 0.2, 0.2]) == pytest.approx((0.2, 0.2, 2 / 8))


def questions(draw: np.random.Generator, skill: float, films: int = 20) -> list[Prediction]:
    rows = []
    for film in range(films):
        for question in range(4):
            right = draw.random() < skill
            kind, answer = ("closed", "yes") if question % 2 else ("open", "left lung")
            row = Prediction(f"f{film}-q{question}", "vqa", "Is there?", answer, kind, answer if right else "no idea")
            row.image, row.image_size, row.patient = f"film{film}", (8, 8), f"p{film // 2}"
            rows.append(row)
        text = "no effusion is seen in the left lower lobe of the lung"
        words = text.split()[: draw.integers(5, 12)] if draw.random() < skill else ["normal", "heart"]
        rows.append(
            Prediction(f"f{film}-report", "report", "Describe.", text, "", " ".join(words), image=f"film{film}")
        )
    return rows


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Three seeds of two systems, as evaluations of runs."""
    found = {}
    for number, (name, skill) in enumerate((("base", 0.4), ("ours", 0.8))):
        for seed in range(3):
            run = tmp_path / f"{name}{seed}"
            rows = questions(np.random.default_rng(10 * number + seed), skill)
            write_predictions(run / "evaluation/val/predictions.jsonl", rows)
            (run / "evaluation/val/scores.json").write_text(json.dumps(score(rows)))
            found[f"{name}{seed}"] = run
    return found


def test_differences_are_those_of_the_scores(files):
    arms = [read_arm(f"base={files['base0']}"), read_arm(f"ours={files['ours0']}")]
    found = {one.metric: one for one in compare(arms)}
    scores = [json.loads((files[name] / "evaluation/val/scores.json").read_text()) for name in ("base0", "ours0")]
    for name in ("closed_accuracy", "open_exact", "open_recall", "bleu", "rouge_l"):
        one = found[name]
        assert (one.baseline_score, one.arm_score) == pytest.approx((scores[0][name], scores[1][name]))
        assert one.difference == pytest.approx(scores[1][name] - scores[0][name])
        assert one.low <= one.difference <= one.high
        assert one.units == 20 and one.unit == "image" and one.p <= one.p_holm
    assert found["questions_correct"].samples == 80 and found["questions_correct"].only_arm > 0
    assert "attention_inside" not in found and found["bleu"].p_mcnemar is None
    assert compare(arms) == compare(arms)
    by_patient = {one.metric: one for one in compare(arms, by="patient", metrics=["open_exact"])}
    assert by_patient["open_exact"].units == 10
    assert by_patient["open_exact"].p_holm == by_patient["open_exact"].p


def test_the_bleu_of_resampled_clusters_is_that_of_their_texts():
    rows = [row for row in questions(np.random.default_rng(0), 0.5) if row.task == "report"]
    measure = MEASURES["bleu"]
    chosen = [0, 0, 3, 7]
    sums_RK = measure.statistics(rows)[chosen].sum(0)[None]
    texts = [rows[i].prediction for i in chosen], [[rows[i].answer for i in chosen]]
    assert measure.score(rows)(sums_RK)[0] == pytest.approx(sacrebleu.corpus_bleu(*texts).score)


def test_several_seeds_are_one_row_with_the_seed_as_the_unit(files, tmp_path, capsys):
    arms = [f"{name}={','.join(str(files[f'{name}{seed}']) for seed in range(3))}" for name in ("base", "ours")]
    assert main(["compare", *arms, "--output", str(tmp_path / "out.json")]) == 0
    table = capsys.readouterr().out
    assert "seeds" in table.splitlines()[0] and "paired t-test" in table
    data = json.loads((tmp_path / "out.json").read_text())
    (one,) = [one for one in data["comparisons"] if one["metric"] == "closed_accuracy"]
    scores = {n: json.loads((files[n] / "evaluation/val/scores.json").read_text())["closed_accuracy"] for n in files}
    expected = stats.ttest_rel([scores[f"ours{i}"] for i in range(3)], [scores[f"base{i}"] for i in range(3)])
    assert (one["units"], one["unit"], one["p"]) == (3, "seed", pytest.approx(expected.pvalue))
    assert one["p_sign_flip"] == 0.25 and "only_arm" not in one
    assert main(["compare", arms[0], f"ours={files['ours0']}"]) == 2
    assert "arm ours has 1 seeds and base has 3" in capsys.readouterr().err


def test_equal_arms_do_not_differ(files):
    arms = [read_arm(f"{name}={files['base0']}") for name in ("one", "two")]
    for found in compare(arms):
        assert (found.difference, found.low, found.high, found.p, found.p_holm) == (0, 0, 0, 1, 1)
    assert "*" not in format_comparisons(compare(arms)).splitlines()[1]


def rewrite(run: Path, rows: list[Prediction]) -> None:
    write_predictions(run / "evaluation/val/predictions.jsonl", rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "1 of 100 samples of"),
        (lambda rows: [replace(rows[0], answer="no"), *rows[1:]], "'f0-q0' has another question or reference"),
        (lambda rows: [replace(rows[0], image="other"), *rows[1:]], "'f0-q0' has another image"),
    ],
)
def test_arms_on_other_samples_are_refused(files, change, message, capsys):
    rewrite(files["ours0"], change(questions(np.random.default_rng(1), 0.8)))
    assert main(["compare", f"base={files['base0']}", f"ours={files['ours0']}"]) == 2
    assert message in capsys.readouterr().err


def test_samples_that_do_not_name_their_cluster_are_refused(files, capsys):
    for name in ("base0", "ours0"):
        rewrite(files[name], [replace(row, image="", patient="") for row in questions(np.random.default_rng(1), 0.8)])
    words = ["compare", f"base={files['base0']}", f"ours={files['ours0']}"]
    for by in ("image", "patient"):
        assert main([*words, "--by", by]) == 2
        assert f"do not name their {by}" in capsys.readouterr().err
    assert main([*words, "--by", "key"]) == 0


def test_wrong_arms_are_refused_by_name(files, tmp_path, capsys):
    base = f"base={files['base0']}"
    second = files["base0"] / "evaluation/test"
    write_predictions(second / "predictions.jsonl", questions(np.random.default_rng(1), 0.8))
    (second / "scores.json").write_text("{}")
    for words, message in (
        ([base], "several evaluations (test, val); choose one with --name"),
        ([base, "--name", "val"], "at least two arms"),
        ([base, base, "--name", "val"], "different names"),
        ([base, f"x={tmp_path}/none", "--name", "val"], "does not exist"),
        ([base, f"ours={files['ours0']}", "--name", "val", "--metrics", "meteor"], "choose from questions_correct"),
        (
            [base, f"ours={files['ours0']}", "--name", "val", "--metrics", "pointing_hits"],
            "pointing_hits has no sample",
        ),
        ([base, f"x={files['ours0']},{files['ours0']}", "--name", "val"], "the same predictions twice"),
    ):
        assert main(["compare", *words]) == 2
        assert message in capsys.readouterr().err


def test_many_seeds_in_one_word_are_paths_each(tmp_path):
    """Together they are longer than the name of a file can be."""
    names = [f"{'x' * 60}-{seed}.jsonl" for seed in range(8)]
    assert parse_word(f"ours={','.join(names)}") == ("ours", [Path(name) for name in names])
    assert parse_word(",".join(names)) == ("", [Path(name) for name in names])
