"""What libraries raise for the content of one sample, so that it is left out and named instead of ending the run."""

from __future__ import annotations

import struct
import zlib

from jinja2 import TemplateError
from PIL import Image

from medalign.data.bad_sample import BadSample
from medalign.errors import from_library

_FOREIGN = (Image.DecompressionBombError, TemplateError, struct.error, zlib.error)


class decoding:
    """Makes a BadSample of what a decoder, a chat template or a tokenizer raises inside.

    `what`, if anything, is put before the reason. Errors of this project pass as they are.
    """

    def __init__(self, what: str = "") -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if from_library(error, *_FOREIGN):
            what = f"{self._what}: " if self._what else ""
            raise BadSample(f"{what}it cannot be used ({type(error).__name__}: {error})") from error
