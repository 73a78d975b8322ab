"""Conversion of a checkpoint to DeepSpeed's universal format, which any number of ranks can load."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from medalign import distributed
from medalign.run_folder import CheckpointFolder

_TAG = CheckpointFolder.STATE


@contextlib.contextmanager
def parts_of_this_rank(optimizer: Any) -> Iterator[None]:
    """Let DeepSpeed load a universal checkpoint for parameter groups of which this rank holds nothing.

    ZeRO-1 and 2 divide each group evenly. The last ranks hold only the padding of a group with few elements, such as
    the biases of a small projector. DeepSpeed reads the number of updates of their first parameter: there is none.

    Args:
        optimizer: DeepSpeed's optimizer of any stage.
    """
    name = "load_hp_checkpoint_state_from_checkpoint_dir"
    if not hasattr(optimizer, "bit16_groups"):  # ZeRO-3 loads in another way
        yield
        return
    load = getattr(optimizer, name)

    def load_held(*words: Any) -> None:
        inner, groups, parameters = optimizer.optimizer, optimizer.optimizer.param_groups, optimizer.bit16_groups
        held = [i for i, group in enumerate(parameters) if any(p._hp_mapping is not None for p in group)]
        # The values that DeepSpeed puts into the remaining groups are replaced afterwards: see Engine.load.
        inner.param_groups, optimizer.bit16_groups = [groups[i] for i in held], [parameters[i] for i in held]
        try:
            load(*words)
        finally:
            inner.param_groups, optimizer.bit16_groups = groups, parameters

    setattr(optimizer, name, load_held)
    try:
        yield
    finally:
        delattr(optimizer, name)


class _ShareDone(Exception):
    """Ends the conversion on a rank whose share of it is done."""


def to_universal(source: Path, target: Path, agree: Callable[[], AbstractContextManager[None]]) -> None:
    """Convert a checkpoint to DeepSpeed's universal format. Every rank must call it.

    The ranks share the files that are read (one per rank that wrote the checkpoint) and the parameters that are
    written. Each rank processes one of them at a time, on the CPU.

    Args:
        source: folder whose files `Engine.capture` has prepared.
        target: folder to write, which must not exist.
        agree: entered for each of the two parts; at its end an error of one rank must be raised on all ranks.
    """
    from deepspeed.checkpoint import ds_to_universal

    parts = 0

    def work(do: Callable[[Any], Any], chunks: Iterable[Any], workers: int) -> list[Any]:
        nonlocal parts
        parts += 1
        with agree():
            # Sorted, because some chunks come from a set, whose order differs between processes.
            mine = sorted(chunks, key=str)[distributed.rank() :: distributed.world_size()]
            done = [do(chunk) for chunk in mine]
        if parts == 2 and not distributed.is_main():
            raise _ShareDone  # what remains are small files
        return done

    settings = argparse.Namespace(
        input_folder=str(source / _TAG),
        output_folder=str(target / _TAG),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # DeepSpeed shares the work among processes of one machine. The ranks do the same on all nodes.
    alone = ds_to_universal._do_parallel_work
    ds_to_universal._do_parallel_work = work
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(settings)
    except _ShareDone:
        pass
    finally:
        ds_to_universal._do_parallel_work = alone
