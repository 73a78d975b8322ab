"""OmniMedVQA: multiple choice; the answer is the text of the correct choice."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from medalign.errors import DataError
from tests.unit.datasets.conversion import pack, samples, skipped, write_json, write_picture


def question(i: int, image: str, **changes: object) -> dict[str, object]:
    return {
        "dataset": "ACRIMA",
        "question_id": f"ACRIMA_{i:04d}",
        "question_type": "Modality Recognition",
        "question": "What imaging technique was employed?",
        "gt_answer": "Fundus imaging",
        "image_path": f"Images/ACRIMA/{image}",
        "option_A": "PET scan",
        "option_B": "CT scan",
        "option_C": "Blood test",
        "option_D": "Fundus imaging",
        "modality_type": "Fundus Photography",
    } | changes


@pytest.fixture
def omni(tmp_path: Path) -> Path:
    folder = tmp_path / "in" / "OmniMedVQA"
    two = {"option_C": None, "option_D": None, "gt_answer": "CT scan"}
    rows = [
        question(0, "Im0.jpg"),
        question(1, "Im0.jpg", **two),
        question(2, "Im1.bmp"),
        question(3, "Im9.jpg"),
        question(4, "Im0.jpg", gt_answer="X-ray"),
        question(5, "Im0.jpg", gt_answer=float("nan")),
        question(6, "Im0.jpg", option_B=float("nan"), option_C="nan"),
    ]
    write_json(folder / "QA_information" / "Open-access" / "ACRIMA.json", rows)
    odd = question(5, "Im0.jpg", modality="CT(Computed Tomography)")
    del odd["modality_type"]
    write_json(folder / "QA_information" / "Open-access" / "Chest CT Scan.json", [odd])
    write_json(folder / "QA_information" / "Restricted-access" / "MURA.json", [question(6, "none.png")])
    write_picture(folder / "Images" / "ACRIMA" / "Im0.jpg", 0)
    Image.new("RGB", (9, 7), (10, 20, 30)).save(folder / "Images" / "ACRIMA" / "Im1.bmp")
    return tmp_path / "in"


def test_choices(omni: Path, tmp_path: Path) -> None:
    account = pack("omnimedvqa", omni, tmp_path / "out")
    assert {name: report.written for name, report in account.splits.items()} == {"test": 5}
    four, two, bitmap, gaps, odd = samples(tmp_path / "out" / "test")
    assert four.question == (
        "What imaging technique was employed? Choose one: PET scan; CT scan; Blood test; Fundus imaging"
    )
    assert (four.answer, four.answer_type) == ("Fundus imaging", "closed")
    assert two.metadata["options"] == ["PET scan", "CT scan"]
    assert gaps.metadata["options"] == ["PET scan", "Fundus imaging"]
    assert (bitmap.images[0].size, bitmap.images[0].getpixel((0, 0))) == ((9, 7), (10, 20, 30))
    assert (odd.key, odd.metadata["modality"]) == ("omni-Chest_CT_Scan-000000", "CT(Computed Tomography)")
    found = skipped(account)
    assert found["omni-ACRIMA-000004"] == "correct answer is not one of the choices"
    assert "Im9.jpg" in found["omni-ACRIMA-000003"]
    assert found["omni-ACRIMA-000005"] == "gt_answer is empty"
    assert len(found) == 3


def test_restricted_questions_and_shares(omni: Path, tmp_path: Path) -> None:
    assert len(pack("omnimedvqa", omni, tmp_path / "all", access="all").skipped) == 4
    account = pack("omnimedvqa", omni, tmp_path / "half", test_share=0.0)
    assert {name: report.written for name, report in account.splits.items()} == {"train": 5}


def test_missing_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"QA_information/Open-access/\*\.json: the questions\n  Images: the images"):
        pack("omnimedvqa", tmp_path, tmp_path / "out")
