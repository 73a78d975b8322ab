"""Exceptions that libraries raise for the content of a sample. They reject this sample instead of ending the run."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError
from PIL import Image

from medalign.data.samples.bad_sample import BadSample
from medalign.errors import from_library

_FOREIGN = (Image.DecompressionBombError, TemplateError, struct.error, zlib.error)


@contextmanager
def as_bad_sample(subject: str = "") -> Iterator[None]:
    """Turn the exceptions of a decoder, a chat template or a tokenizer into BadSample.

    Exceptions of this package are not changed.

    Args:
        subject: what the reason is about, placed before it unless empty.
    """
    try:
        yield
    except Exception as error:
        if not from_library(error, *_FOREIGN):
            raise
        prefix = f"{subject}: " if subject else ""
        raise BadSample(f"{prefix}it cannot be used ({type(error).__name__}: {error})") from error
