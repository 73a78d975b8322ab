"""Trains in a folder whose disk is full for some steps: `python -m tests.e2e.filling FIRST LAST WORD ...`."""

from __future__ import annotations

import sys
from pathlib import Path

from medalign import config
from medalign.run import train
from medalign.training.callbacks import Callback
from medalign.training.trainer import Trainer

BLOCK = bytes(1 << 16)


class FullDisk(Callback):
    """Fills the disk after step `first` to its last byte, and frees it after step `last`."""

    def __init__(self, first: int, last: int, path: Path) -> None:
        self.first, self.last, self.path = first, last, path

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.state.step == self.first:
            self.fill()
        elif trainer.state.step == self.last:
            self.path.unlink()

    def fill(self) -> None:
        with self.path.open("wb", buffering=0) as file:
            for block in (BLOCK, b"0"):
                try:
                    while file.write(block):
                        pass
                except OSError:
                    continue


if __name__ == "__main__":
    first, last, _, recipe, *words = sys.argv[1:]
    settings = config.load(recipe, words)
    train(settings, [FullDisk(int(first), int(last), Path(settings.run.dir) / "filler")])
