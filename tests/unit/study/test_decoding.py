"""The comparison of decoding methods on finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medalign import phantom
from medalign.decoding.base import Decoding
from medalign.evaluation.scores_file import record_probe
from medalign.run_folder import EvaluationFolder
from tests.unit.evaluation.runs_on_disk import make_run
from tools.study import decoding as tool


@pytest.fixture
def reports() -> float:
    return 1.0


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reports: float) -> Path:
    """The films; the answers to them are made up, worse with vhr than with greedy decoding."""
    phantom.write_phantoms(tmp_path / "films", 1, 6, 0, reports=reports)
    shards = tmp_path / "films" / "val"

    def evaluate(run: Path, data: list[str], decodings: list[Decoding], name: str, **_: Any) -> list[Path]:
        assert data == [str(shards)]
        folders = [run / f"{name}-{one.method.name}" for one in decodings]
        for folder, one in zip(folders, decodings, strict=True):
            skill = 0.0 if one.method.name == "vhr" else 0.5 if one.num_beams == 5 else 1.0
            config = {"losses": {"alpha": 0}}
            make_run(folder, shards, skill=skill, aim=0.0, steps=0, config=config)
        return [folder / "evaluation" / "val" for folder in folders]

    monkeypatch.setattr(tool, "evaluate_each", evaluate)
    return shards


def test_each_method_is_compared_with_greedy(shards: Path, tmp_path: Path, capsys: Any) -> None:
    tool.main({"L": tmp_path / "run"}, shards, tmp_path / "found.json", methods=["vhr"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["settings"]["vhr"]["decoding.alpha"] == 2.0
    assert list(found["runs"]["L"]) == ["vhr"]
    correct = found["runs"]["L"]["vhr"][0]
    assert correct["metric"] == "questions_correct" and correct["baseline_score"] == 1.0
    assert correct["difference"] == correct["arm_score"] - 1.0 < 0
    shown = capsys.readouterr().out
    assert "| questions correct | L (greedy 100.0) |" in shown and "| BLEU of reports | L (greedy 100.0) |" in shown
    mark = "**" if correct["p_holm"] < 0.05 else ""
    assert f"| `vhr` | {mark}{100 * correct['difference']:+.1f}{mark} [" in shown
    assert "| yes where no is right | L |\n| --- | --- |\n| `greedy` | 0.0 |\n| `vhr` | " in shown


def test_beam_search_and_the_nucleus_are_evaluations_of_their_own(shards: Path, tmp_path: Path) -> None:
    tool.main({"L": tmp_path / "run"}, shards, tmp_path / "found.json", methods=["beams", "vhr", "nucleus"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["settings"]["beams"]["num_beams"] == 5 and found["settings"]["nucleus"]["top_p"] == 0.9
    scores = {method: rows[0]["arm_score"] for method, rows in found["runs"]["L"].items()}
    assert list(scores) == ["beams", "vhr", "nucleus"]
    assert scores["nucleus"] == 1.0 > scores["beams"] > scores["vhr"]


def test_settings_take_the_place_of_the_published_ones(shards: Path, tmp_path: Path) -> None:
    settings = {"vhr": {"alpha": 3.0}}
    tool.main({"L": tmp_path / "run"}, shards, tmp_path / "found.json", methods=["vhr", "pai"], settings=settings)
    found = json.loads((tmp_path / "found.json").read_text())["settings"]
    assert found["vhr"]["decoding.alpha"] == 3.0 and found["pai"]["decoding.alpha"] == 0.2


@pytest.mark.parametrize("reports", [0.0])
def test_data_without_reports_have_no_bleu(shards: Path, tmp_path: Path, capsys: Any) -> None:
    tool.main({"L": tmp_path / "run"}, shards, tmp_path / "found.json", methods=["vhr"])
    found = json.loads((tmp_path / "found.json").read_text())["runs"]["L"]["vhr"]
    assert [one["metric"] for one in found] == ["questions_correct", "closed_accuracy", "open_exact"]
    assert "BLEU" not in capsys.readouterr().out


def test_probes_are_asked_and_their_accuracy_is_the_mean_of_the_seeds(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    answer, right = tool.evaluate_each, iter([0.5, 0.25, 0.75, 0.0])

    def evaluate(*words: Any, **options: Any) -> list[Path]:
        assert options["probes"] == ["blank"]
        folders = answer(*words, **options)
        for folder in folders:
            record_probe(EvaluationFolder(folder), "blank", {"n": 4, "accuracy": next(right)})
        return folders

    monkeypatch.setattr(tool, "evaluate_each", evaluate)
    runs = [tmp_path / f"L-{seed}" for seed in range(2)]
    tool.main({"L": runs}, shards, tmp_path / "found.json", methods=["vhr"], probes=["blank"])
    found = json.loads((tmp_path / "found.json").read_text())["described"]["L"]
    assert found["greedy"]["blank"] == (0.5 + 0.75) / 2 and found["vhr"]["blank"] == (0.25 + 0.0) / 2
    assert (
        "| accuracy under blank | L |\n| --- | --- |\n| `greedy` | 62.5 |\n| `vhr` | 12.5 |" in capsys.readouterr().out
    )


def test_a_score_that_no_sample_has_gets_no_table() -> None:
    one = {"metric": "open_exact", "baseline_score": 0.25, "difference": 0.5, "low": 0.1, "high": 0.9, "p_holm": 0.01}
    shown = tool.tables({"runs": {"B": {"vcd": [one]}}, "described": {"B": {"vcd": {"false_yes": 0.125}}}})
    assert shown.split("\n\n") == [
        "| open questions, exact | B (greedy 25.0) |\n| --- | --- |\n| `vcd` | **+50.0** [+10.0, +90.0] |",
        "| yes where no is right | B |\n| --- | --- |\n| `vcd` | 12.5 |\n",
    ]


def test_the_seed_is_the_unit_of_an_arm_of_several_runs(shards: Path, tmp_path: Path) -> None:
    runs = [tmp_path / f"L-{seed}" for seed in range(3)]
    tool.main({"L": runs}, shards, tmp_path / "found.json", methods=["vhr"])
    found = json.loads((tmp_path / "found.json").read_text())
    (correct, *_) = found["runs"]["L"]["vhr"]
    assert correct["unit"] == "seed" and correct["low"] == correct["high"] == correct["difference"] < 0
    assert found["described"]["L"].keys() == {"greedy", "vhr"}
    assert found["described"]["L"]["greedy"].keys() >= {"pointing_hits", "false_yes"}
    assert found["described"]["L"]["greedy"]["false_yes"] == 0  # all its answers are right
