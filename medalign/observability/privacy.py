"""What of a run's configuration may leave the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECRET_WORDS = frozenset(
    {"token", "key", "apikey", "secret", "password", "passwd", "credential", "credentials", "auth"}
)
PLACE_WORDS = frozenset({"data", "dir", "path", "file", "folder", "folders", "output"})
FILE_SUFFIXES = (".json", ".yaml", ".yml")  # of the files that settings may name
HIDDEN = "<path>"


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without secrets, and without names of places, which may hold names of patients.

    A key with a word such as token, key, secret or password in it (`hub_token`, not `tokenizer` or `max_tokens`)
    is dropped with its value. What names a place on disk becomes "<path>": a Path, any text under a key with a
    word such as data, dir, path or file in it, and text that is absolute, has several slashes, starts with a dot
    or a tilde, ends as a settings file does, or exists. Elsewhere `organisation/model`, a model's name on a hub, stays.
    """
    return _public(config, False)


def _public(value: Any, is_place: bool) -> Any:
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
