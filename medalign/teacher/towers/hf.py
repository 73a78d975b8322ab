"""What the towers of transformers share: their configuration, and loading that leaves no weight out.

Only local folders are read, and no code in them is run.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from medalign.errors import CheckpointError, ConfigError, from_library
from medalign.geometry import PatchGrid
from medalign.teacher.source import TeacherSource
from medalign.teacher.towers.base import Tower
from medalign.teacher.weights import describe_misfit, refused_code


class HFTower(Tower):
    """A vision tower of transformers.

    Args:
        model: the tower, with what the subclass needs beside it.
        features: "after_norm" or "before_norm".
    """

    def __init__(self, model: Any, features: str = "after_norm") -> None:
        config = model.config
        side = config.image_size // config.patch_size
        super().__init__(PatchGrid(side, side), config.hidden_size, config.image_size, features)
        self.model = model


def read_config(source: TeacherSource, kind: type[PretrainedConfig]) -> Any:
    """Read the vision tower's part of config.json. Raises ConfigError if it cannot be used."""
    with _as_error(ConfigError, f"teacher {source.name} cannot be used"):
        return kind.from_pretrained(source.weights, local_files_only=True)


def check_sizes(source: TeacherSource, kind: type[PretrainedConfig]) -> int:
    """Return the image size in pixels. Raises ConfigError unless patches of a square image cover it exactly."""
    config = read_config(source, kind)
    for key in ("image_size", "patch_size", "num_hidden_layers"):
        value = getattr(config, key)
        if type(value) is not int or value < 1:
            raise ConfigError(f"teacher {source.name}: {key} is {value!r}; supported: a positive integer")
    if config.num_hidden_layers < 2:
        raise ConfigError(f"teacher {source.name}: num_hidden_layers is 1; the tower must have at least two blocks")
    return source.require_whole_patches(config.image_size, config.patch_size)


def build_model(source: TeacherSource, kind: type[PreTrainedModel], config: Any) -> Any:
    """Build a model with random weights. Raises ConfigError if config.json does not describe one."""
    with _as_error(ConfigError, f"teacher {source.name}: transformers cannot build the tower"):
        return kind(config)


def load_model(source: TeacherSource, kind: type[PreTrainedModel], config: Any, others: Sequence[str]) -> Any:
    """Load a model in float32; each of its weights must be in the folder, and no other.

    Args:
        source: the teacher.
        kind: the class of the vision tower.
        config: its configuration.
        others: prefixes of weights that belong to other parts of the published model.

    Raises:
        CheckpointError: the weights cannot be read; or it lists those missing, unexpected, or of another shape.
    """
    with _as_error(CheckpointError, f"teacher weights in {source.weights} cannot be read"), _silence():
        loaded: Any = kind.from_pretrained(
            source.weights,
            config=config,
            dtype="float32",
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            local_files_only=True,
        )
    model, report = loaded
    shapes = [f"{name} {list(found)}, expected {list(wanted)}" for name, found, wanted in report["mismatched_keys"]]
    unexpected = [name for name in report["unexpected_keys"] if not name.startswith(tuple(others))]
    if misfit := describe_misfit(sorted(report["missing_keys"]), sorted(unexpected), sorted(shapes)):
        raise CheckpointError(f"teacher weights in {source.weights} do not fit its config.json: {misfit}")
    return model


def require_text_tower(source: TeacherSource, complete: str) -> None:
    """Raise ConfigError unless the folder holds the complete model, whose kind is `complete`."""
    if source.kind != complete:
        raise ConfigError(
            f"teacher {source.name}: a {source.kind} has no text tower; give the folder of the complete model, or set "
            "teacher.text_weight to 0"
        )


def tokenize(source: TeacherSource, texts: Sequence[str], *, padding: bool | str, length: int) -> Any:
    """Tokenize texts with the folder's tokenizer. Raises ConfigError if there is none.

    Args:
        source: the teacher.
        texts: n texts.
        padding: True pads to the longest text, "max_length" to `length`.
        length: longer texts are cut to this number of tokens.

    Returns:
        The text tower's inputs, int64 [n, L] each.
    """
    with _as_error(ConfigError, f"teacher {source.weights} has no usable tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(source.weights, local_files_only=True, trust_remote_code=False)
        return tokenizer(list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt")


@contextmanager
def _as_error(kind: type[Exception], subject: str) -> Iterator[None]:
    """Turn the exceptions of the library into one error of a single line that begins with `subject`."""
    try:
        yield
    except (ConfigError, CheckpointError):
        raise
    except pickle.UnpicklingError as error:
        raise kind(f"{subject} ({refused_code(error)})") from error
    except Exception as error:
        if not from_library(error, ImportError, SafetensorError, StrictDataclassError):
            raise
        text = str(error).strip()
        # The first line holds the reason, except where a setting of config.json is refused.
        reason = " ".join(text.split()) if isinstance(error, StrictDataclassError) else text.partition("\n")[0]
        raise kind(f"{subject} ({type(error).__name__}: {reason})") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress transformers' report of weights, which become an error here, and its progress bar."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
