"""Conversion of a checkpoint to DeepSpeed's universal format, which any number of ranks can load."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from medalign import distributed
from medalign.run_folder import CheckpointFolder

_TAG = CheckpointFolder.STATE


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
