"""The names of settings: every dotted key, the earlier names, and the errors for an unknown key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from medalign.config.schema import Config
from medalign.errors import ConfigError

OLD_NAMES = {
    "train.clip": "train.max_grad_norm",
    "train.warmup": "train.warmup_ratio",
    "checkpoint.every": "checkpoint.interval",
    "checkpoint.keep": "checkpoint.save_total_limit",
    "log.every": "log.interval",
    "data.max_bad_share": "data.max_skip_fraction",
    "losses.normalise": "losses.normalize",
}
"""Names of settings in earlier versions, with their present names."""

ALTERNATIVES = (("train.steps", "train.epochs"), ("train.warmup_ratio", "train.warmup_steps"))
"""Pairs of settings of which exactly one is set."""


def require_known(keys: Iterable[str], where: str) -> None:
    """Check that each dotted key is a setting.

    Args:
        keys: dotted keys such as "train.lr".
        where: where the keys were found, for the message.

    Raises:
        ConfigError: a key is not a setting. The message gives the nearest known key, or the present name of an old one.
    """
    known = set(all_keys())
    for key in keys:
        if key in OLD_NAMES:
            raise ConfigError(f"{key!r} in {where} is now called {OLD_NAMES[key]!r}; use the new name")
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {where}; {_hint(key, known)}")


def _hint(key: str, known: set[str]) -> str:
    same_name = [name for name in sorted(known) if name.split(".")[-1] == key.split(".")[-1]]
    nearest = [*same_name, *difflib.get_close_matches(key, known, n=1, cutoff=0.5)]
    return f"the nearest known key is {nearest[0]!r}" if nearest else "medalign train --help lists the known ones"


def all_keys(kind: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield every setting as a dotted key, in the order of the fields."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        if is_dataclass(hints[item.name]):
            yield from all_keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert nested sections to one mapping from dotted keys to values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a mapping from dotted keys to nested sections: the inverse of `flatten`."""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return values


def override(flat: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """Replace settings. Where one of two alternatives is set, the other one becomes None.

    Args:
        flat: dotted keys with values.
        by: the dotted keys to replace, with their new values.
    """
    merged = {**flat, **by}
    for pair in ALTERNATIVES:
        for key, other in (pair, pair[::-1]):
            if by.get(key) is not None and other not in by:
                merged[other] = None
    return merged
