"""Runs `medalign` and kills it while it writes a checkpoint: `python -m tests.e2e.dying MOMENT STEP WORD ...`.

MOMENT is "rename", when everything is written and nothing renamed yet, or "pointer", when the checkpoint has its name
and `latest` still refers to an earlier one.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from medalign.__main__ import main


def die_at(moment: str, step: str) -> None:
    method, name = {"rename": ("rename", f".partial-step-{step}"), "pointer": ("replace", ".latest")}[moment]
    real = getattr(Path, method)

    def dying(self: Path, target: Any) -> Path:
        written = self.name == name and (moment == "rename" or step in self.read_text())
        if written:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, target)

    setattr(Path, method, dying)


if __name__ == "__main__":
    die_at(*sys.argv[1:3])
    sys.exit(main(sys.argv[3:]))
