"""What a check finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from medalign.errors import MedAlignError, format_os_error, from_library

Status = Literal["ok", "warning", "error"]
SEVERITY: dict[Status, int] = {"ok": 0, "warning": 1, "error": 2}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: the check.
        status: "ok"; "warning" if the run works but not as well as it could, or not everywhere; "error" if it fails.
        detail: what was found.
        remedy: what helps; empty if the status is "ok".
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


Check = Callable[[], Finding]


def examine(name: str, check: Check) -> Finding:
    """Run a check. What it raises becomes its finding.

    Messages of this package end with the remedy, after a semicolon.
    """
    try:
        return check()
    except MedAlignError as error:
        detail, _, remedy = str(error).rpartition("; ")
        return Finding(name, "error", detail or remedy, remedy if detail else "")
    except OSError as error:
        return Finding(name, "error", format_os_error(error), "make the file or the service available")
    except Exception as error:
        if not from_library(error):
            raise
        text = " ".join(str(error).split())
        return Finding(name, "error", f"{type(error).__name__}: {text}", "report it with the versions above")


def worst(findings: list[Finding]) -> Status:
    """Return the most severe status; "ok" without findings."""
    return max((finding.status for finding in findings), key=SEVERITY.__getitem__, default="ok")
