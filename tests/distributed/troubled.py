"""The workers of test_troubles.py: failures on one of two ranks, in one process group with one engine."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from medalign import distributed
from medalign.checkpoint import export
from medalign.checkpoint.loading import find_whole, load
from medalign.checkpoint.retention import Retention
from medalign.checkpoint.saving import CheckpointWriter
from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.contracts import Batch
from medalign.engine import engine as door
from medalign.engine.engine import Engine
from medalign.errors import DataError
from medalign.losses import LanguageTerm, Objective
from medalign.student.model import Student
from medalign.training import rewind
from medalign.training.callbacks import Checkpointing
from medalign.training.step import TrainStep
from medalign.training.trainer import Trainer
from tests import tiny
from tests.distributed.workers import build, configure, digest, main, share

MICRO = {"micro": 2}


def troubles(settings: dict[str, Any]) -> dict[str, Any]:
    """Cause each failure in turn; return what this rank raised and what was left."""
    door.start({})
    folder = Path(settings["folder"])
    config = configure(settings | MICRO)
    config.train.steps, config.checkpoint.interval = 3, 1
    engine, student, step = build(config)
    language = TrainStep(engine, None, Objective([LanguageTerm()]), student.spec.grid)
    results = {
        "together": raised(lambda: _together(1)),
        "latest": _latest(engine, folder / "seen"),
        "lost shard": _loop(config, step, _lost_shard),
        "export": _exported(config, engine, student, folder / "export"),
        "checkpoints": _checkpoints(engine, folder / "checkpoints"),
        "background": _background(engine, student, language, folder / "background"),
        "rewound": _rewound(config, engine, student, language, folder / "rewound"),
        "exploded": _exploded(engine, student, language),
        "left out": _left_out(config, engine, student, step),
        "diverged": _diverged(config, step),
    }
    door.stop()
    return results


def raised(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:  # noqa: BLE001 (the test compares any exception)
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _together(troubled: int) -> None:
    with distributed.raise_on_all_ranks():
        if distributed.rank() == troubled:
            raise DataError("naïve: a shard is lost")


def _latest(engine: Engine, root: Path) -> dict[str, str]:
    """Write two checkpoints, whose files both ranks check. Rank 1 finds the damage in its part."""
    for step in (1, 2):
        CheckpointWriter(engine, root, Retention(2), "", lambda: Path.mkdir).save(
            TrainState(step=step, samples=0, ranks=2)
        )
    found = {"whole": str(find_whole(root)).removeprefix(str(root))}
    distributed.barrier()
    files = sorted((root / "step-000002" / "state").iterdir(), key=lambda path: (-path.stat().st_size, path.name))
    if distributed.is_main():
        content = bytearray(files[1].read_bytes())  # the second largest file is the first of rank 1
        content[len(content) // 2] ^= 1
        files[1].write_bytes(content)
    distributed.barrier()
    found["damaged"] = str(find_whole(root)).removeprefix(str(root))
    return found


def _loop(config: Config, step: TrainStep, batches: Callable[[], Iterator[list[Batch]]]) -> dict[str, Any]:
    saved: list[int] = []
    begun = TrainState(step=0, samples=0, ranks=2)

    def save(now: TrainState) -> Path:
        saved.append(now.step)
        return Path()

    checkpointing = Checkpointing(config.checkpoint.interval, save)
    shown = raised(lambda: Trainer(config, step, batches(), begun, [checkpointing]).fit())
    return {"raised": shown, "saved": saved}


def _lost_shard() -> Iterator[list[Batch]]:
    yield share(MICRO, 0)
    if distributed.rank() == 1:
        raise DataError("train/shard-000001.tar is gone")
    yield from (share(MICRO, step) for step in itertools.count(1))


def _not_a_number(first: int, last: int, start: int = 1) -> Callable[[], Iterator[list[Batch]]]:
    """In steps `first` to `last`, an image of rank 1 contains NaN."""

    def batches() -> Iterator[list[Batch]]:
        for step in itertools.count(start):
            shares = share(MICRO, step)
            if distributed.rank() == 1 and first <= step <= last:
                nan = torch.full_like(shares[0].student_pixels, torch.nan)
                shares = [dataclasses.replace(shares[0], student_pixels=nan), *shares[1:]]
            yield shares

    return batches


def _exploded(engine: Engine, student: Student, step: TrainStep) -> dict[str, str]:
    """A step whose loss is above its limit, and one below it: whether the parameters have changed."""
    named = [pair for group in student.trainable().values() for pair in group]
    rates = dict.fromkeys(engine.rates(), 0.1)
    found = {}
    for name, limit in (("above", 1e-6), ("below", 1e6)):
        before = engine.gather_parameters(named)
        norm = step(share(MICRO, 0), rates, None, limit)["optim/grad_norm"]
        after = engine.gather_parameters(named)
        changed = any(not torch.equal(before[key], after[key]) for key in before)
        found[name] = distributed.broadcast_from_main("changed" if changed else "same") + f", {math.isfinite(norm)}"
    return found


def _left_out(config: Config, engine: Engine, student: Student, step: TrainStep) -> dict[str, Any]:
    """One NaN in step 2 of 3: what happened, and whether every parameter is still finite."""
    config.train.max_diverged_steps = 1
    found = _loop(config, step, _not_a_number(2, 2))
    whole = engine.gather_parameters([pair for group in student.trainable().values() for pair in group])
    return found | {"finite": all(bool(value.isfinite().all()) for value in whole.values())}


def _diverged(config: Config, step: TrainStep) -> dict[str, Any]:
    """NaN from step 2 on."""
    config.train.max_diverged_steps = 0
    return _loop(config, step, _not_a_number(2, 100))


def _exported(config: Config, engine: Engine, student: Student, folder: Path) -> dict[str, Any]:
    """Compare the exported values with those of the sharded student after some training, and keep its logits."""
    whole = engine.gather_parameters([pair for group in student.trainable().values() for pair in group])
    engine.student.eval()
    with torch.no_grad():
        logits = engine(tiny.batch(), tap=False).logits
    engine.student.train()
    if not distributed.is_main():
        return {}
    export.write_export(student, whole, config.student, config.data.max_length, folder)
    save_file({"logits": logits}, folder / "in_memory.safetensors")
    found = load_file(folder / "adapter_model.safetensors") | load_file(folder / "medalign.safetensors")
    ours = {_exported_name(name): value for name, value in whole.items()}
    return {
        "names": sorted(set(found) ^ set(ours)),
        "differ": [name for name, value in ours.items() if not torch.equal(found[name], value)],
        "still": [name for name, value in ours.items() if not value.abs().max() > 0],
    }


def _exported_name(name: str) -> str:
    return name.removeprefix("model.").replace(".default.", ".") if "lora_" in name else name


def _checkpoints(engine: Engine, root: Path) -> dict[str, Any]:
    """Write a checkpoint, cause failures of every kind, then write another checkpoint."""

    def save(step: int, export: Callable[[Path], None] = Path.mkdir, root: Path = root) -> Path:
        writer = CheckpointWriter(engine, root, Retention(1), "", lambda: export)
        return writer.save(TrainState(step=step, samples=0, ranks=2))

    def full(target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(1)
    results: dict[str, Any] = {}
    for name, troubled in (("rank 0 full", 0), ("rank 1 full", 1)):
        with room(20_000, troubled):
            results[name] = raised(lambda: save(2))
    results["export full"] = raised(lambda: save(2, full))
    if distributed.is_main():
        (root / "file").write_text("")
    results["no folder"] = raised(lambda: save(2, root=root / "file"))
    distributed.barrier()
    results["left"] = sorted(path.name for path in root.iterdir())
    distributed.barrier()
    results["after"] = save(2).name
    return results


def _background(engine: Engine, student: Student, step: TrainStep, root: Path) -> dict[str, Any]:
    """Take steps while a checkpoint is written, load it, and take the same steps again: hashes of the parameters."""
    writer = CheckpointWriter(engine, root, Retention(2), "", lambda: Path.mkdir)
    rates = dict.fromkeys(engine.rates(), 1e-2)

    def steps() -> str:
        for number in range(2):
            step(share(MICRO, number), rates)
        return _hash(engine, student)

    writer.begin(TrainState(step=1, samples=0, ranks=2))
    found: dict[str, Any] = {"first": steps()}
    found["folder"] = writer.finish().name
    with room(20_000, 1):  # rank 1 cannot write
        writer.begin(TrainState(step=2, samples=0, ranks=2))
        found["raised"] = raised(writer.finish)
    whole = find_whole(root)
    found["whole"] = whole.name
    load(engine, whole)
    return found | {"second": steps()}


def _rewound(config: Config, engine: Engine, student: Student, step: TrainStep, root: Path) -> dict[str, Any]:
    """Batches 4 to 7 contain NaN: two rewinds, each from step 6 to step 4; then the same run with interruptions."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8, max_diverged_steps=1))
    writer = CheckpointWriter(engine, root, Retention(10), "", lambda: Path.mkdir)
    states: list[TrainState] = []

    def run(begun: TrainState, times: int) -> str:
        config.train.rewind_on_spike = times

        @contextlib.contextmanager
        def open_trainer(now: TrainState) -> Iterator[Trainer]:
            states.append(now)
            batches = _not_a_number(4, 7, start=now.next_batch)()
            yield Trainer(config, step, batches, now, [Checkpointing(2, writer.save, background=writer)])

        states.append(rewind.fit(open_trainer, begun, engine, root, config.train))
        return _hash(engine, student)

    begun = TrainState(step=0, samples=0, ranks=2)
    writer.save(begun)
    found: dict[str, Any] = {"bound": raised(lambda: run(begun, 1))}
    found["latest"] = (root / "latest").read_text().strip()
    distributed.barrier()
    del states[:]
    found["whole"] = run(load(engine, root / "step-000000"), 2)
    found["states"] = [[state.step, state.rewinds, state.skipped_batches] for state in states]
    # Before and after the rewinds, and the batches that are left by them without any NaN
    found["again from 2"] = run(load(engine, root / "step-000002"), 2)
    found["again from 6"] = run(load(engine, root / "step-000006"), 0)
    found["plain"] = run(dataclasses.replace(load(engine, root / "step-000004"), skipped_batches=4), 0)
    return found


def _hash(engine: Engine, student: Student) -> str:
    whole = engine.gather_parameters([pair for group in student.trainable().values() for pair in group])
    return distributed.broadcast_from_main(digest(whole) if whole else "")


@contextlib.contextmanager
def room(size: int, rank: int) -> Iterator[None]:
    """Limit the files of this rank to `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


if __name__ == "__main__":
    main(globals())
