"""Every family and every form of training resumes bit-identically, on two ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_worker
from tests.unit.student.families.cases import CASES

FORMS: dict[str, dict[str, Any]] = {
    "full": {"train": "full", "train_projector": True, "train_vision_tower": True, "gradient_checkpointing": True},
    "dora": {"lora": {"rank": 4, "alpha": 8, "dora": True}, "steering_rank": 4},
    "layers": {"layer": [2, 1], "query_mixture": True, "train_vision_tower": True},
}
FAMILIES = sorted(set(CASES) - {"llava"})  # all other runs are of it


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, student_folder: Path, teacher_folder: Path) -> Any:
    folder = tmp_path_factory.mktemp("resumed")
    students: dict[str, Any] = {
        name: {"family": name, "folder": str(CASES[name].save(folder / name)), "student": {"train_projector": True}}
        for name in FAMILIES
    }
    students |= {
        name: {"family": "llava", "folder": str(student_folder), "student": settings}
        for name, settings in FORMS.items()
    }
    settings = {"students": students, "teacher": str(teacher_folder), "folder": str(folder / "saved")}
    return run_worker("resumed", settings, 2, folder / "ranks", module="resumed")


@pytest.mark.parametrize("name", [*FAMILIES, *FORMS])
def test_the_losses_after_a_save_do_not_depend_on_a_restart(resumed: Any, name: str) -> None:
    for rank in resumed:
        found = rank[name]
        assert found["resumed"] == found["straight"]
        assert found["straight"][0] != found["first"][0]
        values = [value for row in found["first"] + found["straight"] for value in row.values()]
        assert all(math.isfinite(value) for value in values)
        assert found["straight"][-1]["loss/total"] < found["first"][0]["loss/total"]


def test_the_forms_train_what_they_name(resumed: Any) -> None:
    learned = {name: resumed[0][name]["learned"] for name in FORMS}
    assert learned["full"].keys() == {"language_model", "projector", "vision_tower", "steering"}
    assert learned["layers"].keys() == {"adapters", "mixture", "steering", "vision_tower"}
    assert (learned["layers"]["steering"], learned["dora"]["steering"]) == (2, 2)  # two W, and two factors of one
    assert learned["dora"]["adapters"] == 3 * 3 * 7
