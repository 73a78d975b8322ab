"""The tables of docs/results/instruments.md are those of the result file."""

from __future__ import annotations

import json
from pathlib import Path

from tools.benchmarks.instruments import tables

ROOT = Path(__file__).parents[3]


def test_the_page_has_the_tables_of_the_file():
    result = json.loads((ROOT / "tools/benchmarks/results/instruments.json").read_text())
    page = (ROOT / "docs/results/instruments.md").read_text(encoding="utf-8")
    found = tables(result)
    assert all(table in page for table in found.split("\n\n"))
    assert f"{result['limit']} samples" in page and "One seed" in page
