"""A pytest plugin that writes one JSON line per test as soon as it ends, so that a killed run keeps its outcomes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "GPU_CHECK_OUTCOMES"  # environment variable with the path of the file


def pytest_runtest_logreport(report: Any) -> None:
    """Append the outcome of a test; called by pytest after each phase."""
    if report.when != "call" and report.passed:
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if not report.passed:
        row["reason"] = _reason(report)
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _reason(report: Any) -> str:
    """One line: the reason for a skip, or the error of a failure."""
    if report.skipped:
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return next((line for line in text.splitlines() if line.strip()), "no message")[:300]
