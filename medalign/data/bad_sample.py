"""The error of one sample, and the words that say which part of it is meant."""

from __future__ import annotations

from medalign.errors import DataError

_LONGEST = 120  # characters of a name


class BadSample(DataError):
    """This one sample cannot be used; its neighbours can. The message is the reason, or "shard/key: reason"."""


class naming:
    """Puts what it is about, if anything, before the reason of a BadSample raised inside."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if self._what and isinstance(error, BadSample):
            raise BadSample(f"{self._what}: {error}") from error


def image_name(number: int, images: int) -> str:
    """ "image 2 of 3" for number 1 of three images; "" for an only image, which needs no name."""
    return f"image {number + 1} of {images}" if images > 1 else ""


def shown(name: str) -> str:
    """A key or a file's name for a message: on one line, and of a long one its two ends."""
    text = name if name.isprintable() else repr(name)[1:-1]
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 2 :]}"
