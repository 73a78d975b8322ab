"""Removes secrets and paths from a run's configuration before it leaves the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

SECRET_WORDS = frozenset(
    {"token", "key", "apikey", "secret", "password", "passwd", "credential", "credentials", "auth"}
)
PLACE_WORDS = frozenset(
    {"data", "dir", "path", "file", "folder", "folders", "output", "cache", "lexicon", "tower"}
)  # in the name of each setting that is a path
FILE_SUFFIXES = (".json", ".yaml", ".yml")  # of files that a setting may name
HIDDEN = "<path>"


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without secrets and without paths, which may contain names of patients.

    A key that contains a word such as token, key, secret or password (`hub_token`, but not `tokenizer` or
    `max_tokens`) is removed together with its value. Paths are replaced by "<path>". A value counts as a path if it is
    a Path, if its key contains a word such as data, dir, path or cache, or if its text is an absolute path, contains
    several slashes, starts with ./, ../ or ~, has the suffix of a settings file, or names an existing file. Other
    text such as `organization/model`, the name of a model on a hub, is kept. Dataclasses are read like mappings, at any
    depth.
    """
    public: dict[str, Any] = _public(config, False)
    return public


def _public(value: Any, is_place: bool) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {
            name: _public(inner, is_place or bool(_words(name) & PLACE_WORDS))
            for name, inner in value.items()
            if not _words(name) & SECRET_WORDS
        }
    if isinstance(value, (list, tuple)):
        return [_public(item, is_place) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and value and (is_place or _looks_like_place(value))):
        return HIDDEN
    return value


def _looks_like_place(text: str) -> bool:
    several = text.count("/") > 1 or text.count("\\") > 1 or text.lower().endswith(FILE_SUFFIXES)
    return several or text.startswith(("/", "./", "../", "~", "\\")) or ("/" in text and Path(text).exists())


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
