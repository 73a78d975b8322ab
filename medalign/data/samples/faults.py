"""Exceptions that libraries raise for the content of a sample. They reject this sample instead of ending the run."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError
from PIL import Image

from medalign.data.samples.bad_sample import BadSample

_FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    OSError,
    RuntimeError,  # includes RecursionError and NotImplementedError
    SyntaxError,
    TemplateError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


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
        # Libraries written in Rust, such as tokenizers, raise plain Exception.
        if not isinstance(error, _FOREIGN) and type(error) is not Exception:
            raise
        prefix = f"{subject}: " if subject else ""
        raise BadSample(f"{prefix}it cannot be used ({type(error).__name__}: {error})") from error
