"""Separates what a checkpoint contains from the moment at which it is written."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch


@contextmanager
def captured_saves(writer: Any, *, copy: bool) -> Iterator[list[Callable[[], Path]]]:
    """Collect the calls of `writer.save(state, path)` inside the context, which then write nothing.

    Args:
        writer: a checkpoint engine of DeepSpeed.
        copy: whether to serialize the states at once, so that they may change before they are written.

    Yields:
        Functions that each write one file and return its path. Each may be called once.
    """
    files: list[Callable[[], Path]] = []

    def capture(state_dict: Any, path: str) -> None:
        write = _serialized(state_dict) if copy else partial(save, state_dict)
        files.append(partial(_write, write, Path(path)))

    with ExitStack() as undo:
        save = replace_method(undo, writer, "save", capture)
        yield files


def _serialized(state: Any) -> Callable[[str], None]:
    buffer = io.BytesIO()
    torch.save(state, buffer)

    def write(path: str) -> None:
        Path(path).write_bytes(buffer.getbuffer())
        buffer.close()

    return write


def _write(write: Callable[[str], None], path: Path) -> Path:
    write(str(path))
    return path


@contextmanager
def defer_io_errors(*methods: tuple[Any, str]) -> Iterator[None]:
    """Defer write errors of methods to the end of the context.

    Args:
        *methods: objects and names of their methods. Inside the context these methods do not raise OSError and
            RuntimeError.

    Raises:
        OSError, RuntimeError: the first deferred error, when the context ends.
    """
    failures: list[Exception] = []

    def deferred(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                failures.append(error)

        return call

    with ExitStack() as undo:
        for owner, name in methods:
            replace_method(undo, owner, name, deferred(getattr(owner, name)))
        yield
    if failures:
        raise failures[0]


def replace_method(undo: ExitStack, owner: Any, name: str, replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a method of an object until `undo` is closed.

    Returns:
        The method that was replaced.
    """
    method: Callable[..., Any] = getattr(owner, name)
    setattr(owner, name, replacement)
    undo.callback(delattr, owner, name)
    return method
