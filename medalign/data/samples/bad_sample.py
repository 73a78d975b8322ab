"""The error for a single sample, and helpers that name the part of the sample it is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from medalign.errors import DataError

_MAX_NAME = 120  # characters of a name in a message


class BadSample(DataError):
    """A single sample cannot be used, but its neighbors can. The message is the reason, or "shard/key: reason"."""


@contextmanager
def sample_context(subject: str) -> Iterator[None]:
    """Prefix the reason of a BadSample raised inside with what it is about.

    Args:
        subject: what the reason is about; "" leaves the reason unchanged.
    """
    try:
        yield
    except BadSample as error:
        if not subject:
            raise
        raise BadSample(f"{subject}: {error}") from error


def image_name(index: int, images: int) -> str:
    """Return "image 2 of 3" for index 1 of three images, or "" for a single image, which needs no name."""
    return f"image {index + 1} of {images}" if images > 1 else ""


def short_name(name: str) -> str:
    """Return a key or a file name for a message: on one line, and only both ends of a long one."""
    text = name if name.isprintable() else repr(name)[1:-1]
    return text if len(text) <= _MAX_NAME else f"{text[: _MAX_NAME // 2]}...{text[-_MAX_NAME // 2 :]}"
