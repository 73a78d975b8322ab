"""Reads the settings of a run from a recipe and dotted overrides, checks them, and writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from medalign.config.keys import all_keys, flatten, nest, override, require_known
from medalign.config.recipe_files import read_recipe
from medalign.config.schema import Config
from medalign.config.validation import validate
from medalign.config.value_types import DESCRIPTIONS
from medalign.errors import ConfigError

Section = TypeVar("Section")

# Reasons for a range that its type does not show.
_HINTS = {
    "student.layer": "the tapped block needs one before it",
    "train.epochs": "train.steps 0 writes the untrained student",
    "train.max_grad_norm": "0 disables clipping",
}

# Patterns of the invalid value in jsonargparse's messages. The first match is the value as the user wrote it.
_INVALID = (
    r"Given value: (.+)",
    r"Got value: (.+)",
    r"(\S+) does not conform",
    r"(\S+) not an integer",
    r"(?:invalid literal|could not convert).*: '(.*)'",
)


def load(recipe: str, overrides: Sequence[str] = (), *, models: bool = True, data: bool = True) -> Config:
    """Read the settings of a recipe and apply dotted overrides.

    `${assets}` in a value stands for the folder of the packaged models. A recipe may build on another one with `base:`;
    its own settings replace those of its base.

    Args:
        recipe: a packaged recipe, or the path of a YAML file.
        overrides: words of a command line such as `--train.steps 50`.
        models: whether the paths of the models are required.
        data: whether the folders of shards are required.

    Raises:
        ConfigError: an unknown recipe, an unknown key, a value of the wrong type or range, or settings that contradict
            each other.
    """
    values = nest(override({}, read_recipe(recipe)))
    given = {word[2:].split("=")[0].rstrip("+") for word in overrides if word.startswith("--")}
    require_known(given, "the command line")
    parser = _parser()
    namespace = _parsed(f"recipe {recipe}", lambda: parser.parse_object(values, defaults=True))
    namespace = _parsed("the command line", lambda: parser.parse_args([*overrides], namespace=namespace))
    flat = flatten(namespace.as_dict())
    config = _build(Config, nest(override(flat, {key: flat[key] for key in given})))
    validate(config, models=models, data=data)
    return config


def check(config: Config) -> Config:
    """Check a configuration that was built in Python, as `load` checks a recipe.

    Returns:
        An equal configuration, with each number as the type of its field: 1 becomes 1.0 in a field of type float.

    Raises:
        ConfigError: an attribute that is not a setting, a value of the wrong type or range, or settings that contradict
            each other.
    """
    values = _attributes(config)
    require_known(flatten(values), "the Config")
    namespace = _parsed("the Config", lambda: _parser().parse_object(values, defaults=True))
    checked = _build(Config, namespace.as_dict())
    validate(checked)
    return checked


def dump(config: Config) -> str:
    """Return all settings as YAML, which `load` reads.

    If train.epochs is set, train.steps is null, and a comment gives the number of steps if it is already known.
    """
    values, train = asdict(config), config.train
    comment = ""
    if train.epochs is not None:
        values["train"]["steps"] = None
        comment = f"# {train.epochs} epochs are {train.steps} steps\n" if train.steps is not None else ""
    return comment + yaml.safe_dump(values, sort_keys=False)


def read(path: Path) -> Config:
    """Read the settings that a run wrote into its folder.

    Raises:
        ConfigError: the file does not exist, or a setting in it is not valid.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: {path.parent} is not the folder of a run")
    return load(str(path))


def describe_settings() -> str:
    """Return every setting with its type, default and meaning, as `medalign train --help` shows it."""
    text = _parser().format_help().split("\n\n", 1)[-1]
    # jsonargparse also lists an option that reads a section from a file; here, only a recipe is a file.
    text = re.sub(r"  --[\w.]+ CONFIG\s+Path to a configuration file.\n", "", text)
    types = rf"\b(?:{'|'.join(DESCRIPTIONS)})(?=[,\])]|\s+\|)"  # where a type stands, not in a sentence
    return re.sub(types, lambda name: DESCRIPTIONS[name[0]], text)


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the lines under the fields become the help
    parser = ArgumentParser(exit_on_error=False, default_env=False, add_help=False)
    for section in fields(Config):
        parser.add_class_arguments(get_type_hints(Config)[section.name], section.name)
    return parser


def _parsed(where: str, parse: Callable[[], Namespace]) -> Namespace:
    """Return what `parse` returns, and turn the error for an invalid value into a ConfigError that begins with `where`.

    Raises:
        ConfigError: a value is not valid.
    """
    try:
        return parse()
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {_explain(str(error))}") from None


def _explain(message: str) -> str:
    """Shorten a message of jsonargparse to one line: for an invalid value the key, the value and what is allowed."""
    keys = re.findall(r'[Kk]ey "([\w.]+)"', message)
    if keys and (item := _item_of(keys[0])):
        if unknown := re.search(r"Option '(.+)' is not accepted", message):
            known = ", ".join(entry.name for entry in fields(item))
            return f"unknown key {unknown[1]!r} in an item of {keys[0]}; it can have {known}"
        if "Expected a dot import path" in message:
            return f"each item of {keys[0]} must be a section of settings such as {{{fields(item)[0].name}: ...}}"
        keys = [".".join(keys[:2])]
    key = keys[0] if keys else ""
    rule = re.search(r"does not conform to restriction (v.+)", message)
    value = next((found for pattern in _INVALID if (found := re.search(pattern, message))), None)
    if not (value and key and (key in all_keys() or _item_of(key.rpartition(".")[0]))):
        return " ".join(message.split())
    must = re.sub(r"v(<=|>=|<|>)", r"\1 ", rule[1]) if rule else _describe_type(_type_of(key))
    hint = f" ({_HINTS[key]})" if rule and key in _HINTS else ""
    return f"{key} is {value[1]}; it must be {must}{hint}"


def _type_of(key: str) -> Any:
    """Return the type of a setting."""
    kind: Any = Config
    for name in key.split("."):
        kind = get_type_hints(_item_type(kind) or kind)[name]
    return kind


def _item_of(key: str) -> type | None:
    """Return the section that each item of a setting is; None for another setting, or what is not a setting."""
    return _item_type(_type_of(key)) if key in all_keys() else None


def _item_type(kind: Any) -> type | None:
    """Return the dataclass in list[dataclass]; None for any other type."""
    item = get_args(kind)[0] if get_origin(kind) is list else None
    return item if isinstance(item, type) and is_dataclass(item) else None


def _describe_type(kind: Any) -> str:
    """Describe the values of a type in words."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if get_origin(kind) is list:
        return f"a list, each item {_describe_type(arguments[0])}"
    if get_origin(kind) is tuple:
        return f"a list of {len(arguments)} items, each {_describe_type(arguments[0])}"
    if arguments:
        return " or ".join(_describe_type(one) for one in arguments)
    if is_dataclass(kind):
        return "a section"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return next(word for base, word in words.items() if issubclass(kind, base))


def _build(kind: type[Section], values: Mapping[str, Any]) -> Section:
    """Build a dataclass and its sections from nested values."""
    hints = get_type_hints(kind)
    arguments = {}
    for item in fields(kind):  # type: ignore[arg-type]
        value, hint = values[item.name], hints[item.name]
        if isinstance(value, dict):
            arguments[item.name] = _build(hint, value)
        elif section := _item_type(hint):
            arguments[item.name] = [_build(section, one) for one in value]
        else:
            arguments[item.name] = _plain(value)
    return kind(**arguments)


def _attributes(section: Any) -> dict[str, Any]:
    """Return the attributes of a dataclass as nested values, including attributes that are not fields."""
    return {name: _values(value) for name, value in vars(section).items()}


def _values(value: Any) -> Any:
    """Convert a section, or the sections in a list, to nested values."""
    if isinstance(value, list):
        return [_values(one) for one in value]
    return _attributes(value) if is_dataclass(value) else value


def _plain(value: Any) -> Any:
    """Convert jsonargparse's number types to int and float, also inside lists and tuples."""
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, int) else float(value)
