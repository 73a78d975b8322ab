"""S-Chain from parquet files in the layout of Hugging Face: the last question, with boxes and the steps before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from medalign.errors import DataError
from tests.unit.data.tiny_data import picture
from tests.unit.datasets.conversion import pack, samples, skipped
from tests.unit.datasets.parquet_files import write_parquet

BOXES = "[[0.25, 0.5, 0.5, 0.75], [0.1, 0.0, 1.0, 0.125]]"


def row(i: int, **changes: object) -> dict[str, object]:
    return {
        "A1": BOXES,
        "A2": "Widened sulci in the parietal lobes.\n",
        "A3": "GCA=1, Koedam=1, MTA=2",
        "A4": "Mild-Dementia",
        "Bbox coordinates normalized (X, Y, W, H)": "0.25 0.5 0.25 0.25",
        "Deliverable": f"{i}.jpg",
        "Notes": "GCA=1: mild",
        "Patient ID": "OAS1_0002",
        "Q1": "Where is the atrophy?",
        "Q2": "What is seen there?",
        "Q3": "How is it rated?",
        "Q4": "Which grade of dementia is it?",
        "Slide": f"mpr-1_{i}",
        "image": {"bytes": picture(i, 40, 24, kind="jpg"), "path": f"{i}.jpg"},
        "image_with_bboxes": {"bytes": b"never read", "path": f"{i}.jpg"},
    } | changes


@pytest.fixture
def s_chain(tmp_path: Path) -> Path:
    folder = tmp_path / "S-Chain"
    odd = {
        "text": "no boxes here",
        "three numbers": "[[0.1, 0.2, 0.3]]",
        "widths and heights": "[[0.5, 0.5, 0.25, 0.25]]",
        "pixels": "[[1, 2, 30, 40]]",
        "a call": "__import__('os').getcwd()",
        "deep": "[" * 300 + "]" * 300,
        "one number": "0.5",
    }
    first = [row(0), row(1, A1=None, A4="Non-Dementia"), row(2, A1="[[[0.25, 0.5, 0.5, 0.75]]]")]
    write_parquet(folder / "English" / "train-00000-of-00002.parquet", first)
    write_parquet(folder / "English" / "train-00001-of-00002.parquet", [row(9, A1=value) for value in odd.values()])
    write_parquet(folder / "English" / "test-00000-of-00001.parquet", [row(3, **{"Patient ID": "OAS1_0003"})])
    for split in ("train", "test"):
        write_parquet(folder / "french" / f"{split}-00000-of-00001.parquet", [row(4, Q4="Quel stade ?")])
    return folder


def test_the_last_question_with_boxes_and_steps(s_chain: Path, tmp_path: Path) -> None:
    account = pack("s-chain", s_chain, tmp_path / "out")
    assert {name: report.written for name, report in account.splits.items()} == {"train": 3, "test": 1}
    whole, healthy, nested = samples(tmp_path / "out" / "train")
    assert (whole.question, whole.answer, whole.answer_type) == (
        "Which grade of dementia is it?",
        "Mild-Dementia",
        "closed",
    )
    assert whole.boxes == ((10, 12, 20, 18), (4, 0, 40, 3))  # of 40 x 24 pixels
    assert [step["question"] for step in whole.metadata["steps"]] == [row(0)[f"Q{i}"] for i in (1, 2, 3)]
    assert [step["answer"] for step in whole.metadata["steps"]] == [
        BOXES,
        "Widened sulci in the parietal lobes.",
        "GCA=1, Koedam=1, MTA=2",
    ]
    kept = {name: whole.metadata[name] for name in ("patient", "case", "language", "boxes_xywh", "notes")}
    assert kept == {
        "patient": "OAS1_0002",
        "case": "OAS1_0002/mpr-1_0",
        "language": "English",
        "boxes_xywh": "0.25 0.5 0.25 0.25",
        "notes": "GCA=1: mild",
    }
    assert healthy.boxes == () and nested.boxes == ((10, 12, 20, 18),)
    assert samples(tmp_path / "out" / "test")[0].metadata["patient"] == "OAS1_0003"


def test_boxes_of_another_form_are_refused_by_name(s_chain: Path, tmp_path: Path) -> None:
    reasons = list(skipped(pack("s-chain", s_chain, tmp_path / "out")).values())
    assert len(reasons) == 7
    assert "which is not a list of boxes" in reasons[0]
    assert "is not four numbers" in reasons[1]
    assert "(0.5, 0.5, 0.25, 0.25)" in reasons[2] or "[0.5, 0.5, 0.25, 0.25]" in reasons[2]
    assert all("is not corners [x0, y0, x1, y1] in shares of the image" in reasons[i] for i in (2, 3))
    assert all("A1" in reason for reason in reasons)


def test_languages_are_folders(s_chain: Path, tmp_path: Path) -> None:
    account = pack("s-chain", s_chain, tmp_path / "out", languages=["French"])
    assert {name: report.written for name, report in account.splits.items()} == {"train": 1, "test": 1}
    (sample,) = samples(tmp_path / "out" / "train")
    assert (sample.key, sample.question) == ("s-chain-French-train-00000-00000", "Quel stade ?")
    with pytest.raises(DataError, match=r"German/train-\*\.parquet: the train split in German"):
        pack("s-chain", s_chain, tmp_path / "none", languages=["English", "German"])
