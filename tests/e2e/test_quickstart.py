"""tools/quickstart.sh with few films and steps: the launcher, two ranks, the report."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / ".venv/.installed").is_file(), reason="tools/test.sh makes .venv, which is not here")
def test_quickstart(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    few = {"STEPS": "2", "TRAIN": "16", "VAL": "3", "RANKS": "2", "ARMS": "base medalign"}
    command = ["bash", "tools/quickstart.sh", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | few, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    scores = {
        arm: json.loads((folder / arm / "evaluation/val/scores.json").read_text()) for arm in ("base", "medalign")
    }
    assert scores["base"]["n"] == scores["medalign"]["n"] > 5
    rows = [json.loads(line) for line in (folder / "medalign/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and rows[-1]["loss/similarity"] > 0 and rows[-1]["loss/attention"] > 0
    assert '"ranks": 2' in next((folder / "medalign/checkpoints").glob("step-*/progress.json")).read_text()
    page = (folder / "report.html").read_text()
    assert "base" in page and "medalign" in page and "data:image" in page
    assert str(folder / "report.html") in done.stdout + done.stderr
    refused = subprocess.run(command, cwd=ROOT, env=os.environ | few | {"SEED": "5"}, capture_output=True, text=True)
    assert refused.returncode == 2 and "was started with SEED=0" in refused.stderr
