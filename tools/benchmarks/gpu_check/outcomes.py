"""A pytest plugin: one JSON line per test as soon as it is over, so that a killed run has said what it found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "GPU_CHECK_OUTCOMES"  # the file


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.passed:
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if not report.passed:
        row["reason"] = _reason(report)
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _reason(report: Any) -> str:
    """One line: of a skip what it was told, of a failure what was raised."""
    if report.skipped:
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return next((line for line in text.splitlines() if line.strip()), "no message")[:300]
