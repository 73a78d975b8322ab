"""Every family and every form of training resumes bit-identically, on two ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import ROOT, run_worker
from tests.unit.student.families.cases import CASES

DORA = {"lora": {"rank": 4, "alpha": 8, "dora": True}, "steering_rank": 4}
FORMS: dict[str, dict[str, Any]] = {
    "full": {"train": "full", "train_projector": True, "train_vision_tower": True, "gradient_checkpointing": True},
    "dora": DORA,
    "dora under ZeRO-2": DORA,
    "layers": {"layer": [2, 1], "query_mixture": True, "train_vision_tower": True},
}
FAMILIES = sorted(set(CASES) - {"llava"})  # the forms are of it


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, student_folder: Path, teacher_folder: Path) -> Any:
    folder = tmp_path_factory.mktemp("resumed")
    students: dict[str, Any] = {
        name: {"family": name, "folder": str(CASES[name].save(folder / name)), "student": {"train_projector": True}}
        for name in FAMILIES
    }
    # Without the threshold, small weights would stay whole: DoRA needs those of its base layer outside their module.
    zero3 = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(zero3))
    for name, settings in FORMS.items():
        engine = "zero2" if "ZeRO-2" in name else str(folder / "zero3.json")
        students[name] = {"family": "llava", "folder": str(student_folder), "student": settings, "engine": engine}
    settings = {"students": students, "teacher": str(teacher_folder), "folder": str(folder / "saved")}
    return run_worker("resumed", settings, 2, folder / "ranks", module="resumed")


@pytest.mark.parametrize("name", [*FAMILIES, *FORMS])
def test_the_losses_after_a_save_do_not_depend_on_a_restart(resumed: Any, name: str) -> None:
    for rank in resumed:
        found = rank[name]
        assert found["resumed"] == found["straight"]
        rows = [*found["first"], *found["straight"]]
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert rows[-1]["loss/total"] < rows[0]["loss/total"]  # each step is of the same batch


def test_the_forms_train_what_they_name(resumed: Any) -> None:
    learned = {name: resumed[0][name]["learned"] for name in FORMS}
    assert learned["full"].keys() == {"language_model", "projector", "vision_tower", "steering"}
    assert learned["layers"].keys() == {"adapters", "mixture", "steering", "vision_tower"}
    assert (learned["layers"]["steering"], learned["dora"]["steering"]) == (2, 2)  # two W, and two factors of one
    assert learned["dora"]["adapters"] == 3 * 3 * 7


def test_dora_under_zero3_equals_zero2(resumed: Any) -> None:
    """fp32 sums in another order."""
    zero3, zero2 = (resumed[0][name]["straight"] for name in ("dora", "dora under ZeRO-2"))
    for row, other in zip(zero3, zero2, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
