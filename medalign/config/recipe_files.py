"""Recipes: YAML files, packaged or given by a path, that may build on one another with `base:`.

Packaged recipes are in folders, one per student, and are named FOLDER/NAME. The folder `parts` has what they are built
from: the settings of a student, of a data set, or of a form of the losses.
"""

from __future__ import annotations

import difflib
import itertools
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
"""The key in a recipe for the recipe that it builds on, or for a list of them, of which the later ones win."""

PARTS = "parts"
"""The folder of what is not a recipe by itself."""


def recipes() -> list[str]:
    """Return the names of the packaged recipes, those outside of folders first."""
    folders = sorted(entry.name for entry in _folder().iterdir() if entry.is_dir() and entry.name != PARTS)
    return _names("") + [name for folder in folders for name in _names(f"{folder}/")]


def _names(prefix: str) -> list[str]:
    entries = (_folder() / prefix).iterdir()
    return sorted(prefix + e.name.removesuffix(".yaml") for e in entries if e.name.endswith(".yaml"))


def group_recipes() -> list[str]:
    """Return the names of the packaged recipes, those of a folder together, such as `llava_med/{slake, vqa_rad}`."""
    groups = itertools.groupby(recipes(), key=lambda recipe: recipe.rpartition("/")[0])
    found: list[str] = []
    for folder, names in ((folder, list(group)) for folder, group in groups):
        inside = ", ".join(name.removeprefix(f"{folder}/") for name in names)
        found += [f"{folder}/{{{inside}}}"] if folder and len(names) > 1 else names
    return found


def summarize(recipe: str) -> str:
    """Return what a packaged recipe is: the first sentence of its comment."""
    comment = itertools.takewhile(lambda line: line.startswith("# "), _read(recipe, "").splitlines())
    return " ".join(line.removeprefix("# ") for line in comment).split(". ")[0].removesuffix(".")


def read_recipe(name: str) -> dict[str, Any]:
    """Read the settings of a recipe and of the recipes that it builds on, as dotted keys with values.

    Args:
        name: a packaged recipe, or the path of a YAML file.

    Raises:
        ConfigError: an unknown recipe or base, a part of recipes, a cycle of bases, text that is not YAML, or an
            unknown key.
    """
    if name.startswith(f"{PARTS}/") and is_packaged(name):
        raise ConfigError(
            f"{name} is only a part of recipes; give a whole recipe, or build one on it with base: in a YAML file"
        )
    return _resolve(name, ())


def _resolve(name: str, trail: Sequence[str]) -> dict[str, Any]:
    """Read a recipe and its bases. `trail` contains the recipes that lead to this one by their bases."""
    if name in trail:
        raise ConfigError(f"recipes build on one another in a cycle: {' -> '.join((*trail, name))}; remove one base")
    values = _parse(name, trail)
    bases = values.pop(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"recipe {name}: base is {bases!r}; it must be a packaged recipe, the path of a YAML file, or a list"
        )
    flat = flatten(values)
    require_known(flat, f"recipe {name}")
    found: dict[str, Any] = {}
    for base in bases:
        found = override(found, _resolve(_base_name(base, name), (*trail, name)))
    return override(found, flat)


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
    known = {recipe.rpartition("/")[2]: recipe for recipe in recipes()} | {recipe: recipe for recipe in recipes()}
    near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(os.path.basename(name), known, n=1)
    hint = f"did you mean {known[near[0]]}? " if near else ""
    if name.endswith((".yaml", ".yml")):
        hint = f"there is no such file. {hint.capitalize()}"
    packaged = ", ".join(group_recipes())
    raise ConfigError(
        f"unknown recipe {name!r}{role}: {hint}Packaged recipes: {packaged}; or give a path to a YAML file"
    )


def is_packaged(name: str) -> bool:
    """Return whether `name` is a packaged recipe. A file with the same name and no suffix does not replace it."""
    return bool(re.fullmatch(r"[\w-]+(/[\w-]+)?", name)) and (_folder() / f"{name}.yaml").is_file()


def _folder() -> Traversable:
    return resources.files("medalign.config") / "recipes"
