"""Reading a model folder: what the libraries raise for its files becomes one line that names the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from medalign.errors import ConfigError, from_library


class reading:
    """Makes a ConfigError of what a library raises inside. Errors of this project pass as they are.

    `what` is put before the reason: the folder and the part of it that is read.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if from_library(error, ImportError, SafetensorError, StrictDataclassError, TemplateError):
            raise ConfigError(f"{self._what}: {reason(error)}") from error


def reason(error: BaseException | None) -> str:
    """An error in one line. The type is named where the text alone says too little, as that of a KeyError."""
    if isinstance(error, StrictDataclassError):  # of the class that stands for config.json
        return f"config.json: {' '.join(str(error).split())}"
    text = str(error).strip().partition("\n")[0]
    clear = isinstance(error, OSError | ValueError | IndexError) or type(error) is Exception
    return text if clear else f"{type(error).__name__}: {text}"


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Without its report of missing weights, which is told as an error, and its bar for weights that are not read."""
    level = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
