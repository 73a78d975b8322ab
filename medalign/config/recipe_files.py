"""Recipes: YAML files, packaged or given by a path, that may build on one another with `base:`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from medalign.config.keys import flatten, override, require_known
from medalign.errors import ConfigError

BASE = "base"
"""The key in a recipe for the name of the recipe that it builds on."""


def recipes() -> list[str]:
    """Return the names of the packaged recipes."""
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Read the settings of a recipe and of the recipes that it builds on, as dotted keys with values.

    Args:
        name: a packaged recipe, or the path of a YAML file.

    Raises:
        ConfigError: an unknown recipe or base, a cycle of bases, text that is not YAML, or an unknown key.
    """
    return _resolve(name, ())


def _resolve(name: str, trail: Sequence[str]) -> dict[str, Any]:
    """Read a recipe and its bases. `trail` contains the recipes that lead to this one by their bases."""
    if name in trail:
        raise ConfigError(f"recipes build on one another in a cycle: {' -> '.join((*trail, name))}; remove one base")
    values = _parse(name, trail)
    base = values.pop(BASE, None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"recipe {name}: base is {base!r}; it must be one packaged recipe or the path of a YAML file")
    flat = flatten(values)
    require_known(flat, f"recipe {name}")
    if base is None:
        return flat
    return override(_resolve(_base_name(base, name), (*trail, name)), flat)


def _base_name(base: str, child: str) -> str:
    """Return the name of a packaged recipe, or a path; a relative path starts at the file of the recipe `child`."""
    if is_packaged(base):
        return base
    return os.path.normpath(base if is_packaged(child) else Path(child).parent / base)


def _parse(name: str, trail: Sequence[str]) -> dict[str, Any]:
    text = _read(name, f" (the base of {trail[-1]})" if trail else "")
    try:
        values = yaml.safe_load(text.replace("${assets}", str(resources.files("medalign") / "assets"))) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {name} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {name} must contain sections such as 'train:', found {type(values).__name__}")
    return values


def _read(name: str, role: str) -> str:
    if is_packaged(name):
        return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    if os.path.isfile(name):
        try:
            return Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"recipe {name} is not text (UTF-8); give a YAML file") from error
    near = difflib.get_close_matches(os.path.basename(name), recipes(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    if name.endswith((".yaml", ".yml")):
        hint = f"there is no such file. {hint.capitalize()}"
    raise ConfigError(
        f"unknown recipe {name!r}{role}: {hint}Packaged recipes: {', '.join(recipes())}; or give a path to a YAML file"
    )


def is_packaged(name: str) -> bool:
    """Return whether `name` is a packaged recipe. A file with the same name and no suffix does not replace it."""
    return bool(re.fullmatch(r"[\w-]+", name)) and (_folder() / f"{name}.yaml").is_file()


def _folder() -> Traversable:
    return resources.files("medalign.config") / "recipes"
