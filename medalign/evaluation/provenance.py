"""What an evaluation was made of, for scores.json. It contains no absolute path."""

from __future__ import annotations

import hashlib
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medalign import __version__
from medalign.run_folder import CheckpointFolder, CheckpointsFolder

_PACKAGES = ("torch", "transformers", "peft", "numpy", "sacrebleu", "rouge-score")


def describe_weights(export: Path) -> dict[str, Any]:
    """Return the step of a trained student, and the SHA-256 of each of its files.

    The base model is not part of an export: its files are not hashed.

    Args:
        export: the folder of the export. The step is None if it is not the export of a checkpoint.
    """
    checkpoint = CheckpointFolder(export.resolve().parent)
    known = CheckpointsFolder(checkpoint.path.parent).by_step().values()
    files = sorted(path for path in export.iterdir() if path.is_file())
    return {
        "step": checkpoint.step if checkpoint in known and export.name == checkpoint.export.name else None,
        "weights": {path.name: _sha256(path) for path in files},
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the libraries that determine answers and scores."""
    found = {"python": platform.python_version(), "medalign": __version__}
    return found | {name: version(name) for name in _PACKAGES}


def command_line(words: Sequence[str]) -> str:
    """Return a command as text for a shell, with only the last name of each absolute path."""
    return shlex.join(["medalign", *map(_without_folders, words)])


def _without_folders(word: str) -> str:
    option, mark, value = word.partition("=")
    if mark and option.startswith("-"):
        return f"{option}={_without_folders(value)}"
    return Path(word).name or "/" if Path(word).is_absolute() else word


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
