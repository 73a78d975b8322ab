"""An engine that writes small files, and a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from medalign.checkpoint.retention import Retention
from medalign.checkpoint.saving import CheckpointWriter
from medalign.checkpoint.state import TrainState


class FakeEngine:
    """Writes one file, or fails halfway through it as on a full disk."""

    def __init__(self, full: bool = False) -> None:
        self.full = full
        self.student = SimpleNamespace(parameters=lambda: [torch.nn.Parameter(torch.zeros(1000))])
        self.loaded: list[Path] = []

    def capture(self, folder: Path, *, copy: bool) -> list[Callable[[], Path]]:
        def write() -> Path:
            (folder / "shard").write_bytes(bytes(range(256)) * 16)
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return folder / "shard"

        return [write]

    def load(self, folder: Path, *, universal: bool = False) -> None:
        assert universal == folder.name.startswith(".partial-") and folder.is_dir()
        self.loaded.append(folder)


def export(folder: Path) -> None:
    folder.mkdir()
    (folder / "medalign.json").write_text("{}")


def at(step: int, ranks: int = 1) -> TrainState:
    return TrainState(step=step, samples=step * 4, ranks=ranks)


def writer(
    root: Path,
    keep: Retention | int = 2,
    export: Callable[[Path], None] = export,
    engine: FakeEngine | None = None,
) -> CheckpointWriter:
    retention = keep if isinstance(keep, Retention) else Retention(keep)
    return CheckpointWriter(engine or FakeEngine(), root, retention, "train: {lr: 0.1}\n", lambda: export)


def save(
    root: Path,
    state: TrainState,
    keep: Retention | int = 2,
    export: Callable[[Path], None] = export,
    engine: FakeEngine | None = None,
) -> Path:
    return writer(root, keep, export, engine).save(state)


@contextlib.contextmanager
def room(size: int):
    """Limit files to `size` bytes, which is what a writer sees on a full disk or at the end of a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
