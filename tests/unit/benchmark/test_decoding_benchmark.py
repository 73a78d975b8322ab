"""The benchmark of decoding methods measures a student from a folder."""

from __future__ import annotations

import json
from pathlib import Path

from tools.benchmarks.decoding import main


def test_a_student_from_a_folder(student_folder: Path, tmp_path: Path) -> None:
    methods = ["second", "second, once", "cai", "opera"]
    main(tmp_path / "found.json", [str(student_folder)], methods, samples=2, new_tokens=2, rounds=1)
    found = json.loads((tmp_path / "found.json").read_text())["students"][student_folder.name]
    assert found["image_tokens"] == 16 and found["dtype"] == "float32"
    assert set(found["over_greedy"]) == {"greedy", *methods} and not found["refused"]
    assert all(row["time"] > 0 and row["memory"] > 0 for row in found["over_greedy"].values())
