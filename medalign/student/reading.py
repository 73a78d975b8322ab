"""Convert exceptions that libraries raise for the files of a model folder into errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from medalign.errors import ConfigError, from_library


@contextmanager
def as_config_error(subject: str) -> Iterator[None]:
    """Turn the exceptions of a library into ConfigError.

    Exceptions of this package are not changed.

    Args:
        subject: what is read, with its folder; placed before the reason.
    """
    try:
        yield
    except Exception as error:
        if not from_library(error, ImportError, SafetensorError, StrictDataclassError, TemplateError):
            raise
        raise ConfigError(f"{subject}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Format an error in one line, with its type if the text is unclear without it, as for a KeyError."""
    if isinstance(error, StrictDataclassError):  # raised for values of config.json
        return f"config.json: {' '.join(str(error).split())}"
    text = str(error).strip().partition("\n")[0]
    clear = isinstance(error, OSError | ValueError | IndexError) or type(error) is Exception
    return text if clear else f"{type(error).__name__}: {text}"


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Suppress transformers' report of missing weights and its progress bar inside the context.

    Missing weights are reported as an error, and no weights are read.
    """
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
