"""A run's settings from a recipe and dotted overrides, and their form on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from medalign.config.keys import all_keys, flatten, nest, override, require_known
from medalign.config.recipe_files import read_recipe
from medalign.config.schema import Config
from medalign.config.validation import validate
from medalign.errors import ConfigError

Section = TypeVar("Section")

# What the type of a field does not say about the values it refuses.
_HINTS = {
    "student.layer": "the tapped block needs one before it",
    "train.epochs": "train.steps 0 writes the untrained student",
    "train.max_grad_norm": "0 disables clipping",
}

# Where jsonargparse's messages show the value that is refused; the first that is found is the value as it was written.
_REFUSED = (
    r"Given value: (.+)",
    r"Got value: (.+)",
    r"(\S+) does not conform",
    r"(?:invalid literal|could not convert).*: '(.*)'",
)


def load(recipe: str, overrides: Sequence[str] = (), *, models: bool = True) -> Config:
    """The settings of a recipe after dotted overrides.

    `${assets}` in a value is the folder of the packaged models. A recipe may name another one with `base:`; its own
    settings replace those of its base.

    Args:
        recipe: a packaged recipe, or the path of a YAML file.
        overrides: words of a command line such as `--train.steps 50`.
        models: False does without the paths of the models, for what concerns the data only.

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
    validate(config, models=models)
    return config


def dump(config: Config) -> str:
    """The settings as YAML, complete, readable by `load`.

    If train.epochs is set, train.steps stays null, and a comment gives the number of steps if it is already known.
    """
    values, train = asdict(config), config.train
    comment = ""
    if train.epochs is not None:
        values["train"]["steps"] = None
        comment = f"# {train.epochs} epochs are {train.steps} steps\n" if train.steps is not None else ""
    return comment + yaml.safe_dump(values, sort_keys=False)


def read(path: Path) -> Config:
    """The settings that a run wrote into its folder. Raises ConfigError if `path` does not exist."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: {path.parent} is not the folder of a run")
    return load(str(path))


def describe_settings() -> str:
    """Every setting with its type, default and meaning, as `medalign train --help` shows it."""
    text = _parser().format_help().split("\n\n", 1)[-1]
    # jsonargparse offers a file for each section too; a recipe is the one file here.
    return re.sub(r"  --[\w.]+ CONFIG\s+Path to a configuration file.\n", "", text)


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the lines under the fields become the help
    parser = ArgumentParser(exit_on_error=False, default_env=False, add_help=False)
    for section in fields(Config):
        parser.add_class_arguments(get_type_hints(Config)[section.name], section.name)
    return parser


def _parsed(where: str, parse: Callable[[], Namespace]) -> Namespace:
    """What `parse` returns. Raises ConfigError, which names `where`, if a value is refused."""
    try:
        return parse()
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {_explain(str(error))}") from None


def _explain(message: str) -> str:
    """jsonargparse's message in one line; for a value that is refused, its key, its value and what is allowed only."""
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    rule = re.search(r"does not conform to restriction (v.+)", message)
    value = next((found for pattern in _REFUSED if (found := re.search(pattern, message))), None)
    if not (key and value and key[1] in all_keys()):
        return " ".join(message.split())
    must = re.sub(r"v(<=|>=|<|>)", r"\1 ", rule[1]) if rule else _describe_type(_type_of(key[1]))
    hint = f" ({_HINTS[key[1]]})" if rule and key[1] in _HINTS else ""
    return f"{key[1]} is {value[1]}; it must be {must}{hint}"


def _type_of(key: str) -> Any:
    """The type of a setting."""
    kind: Any = Config
    for name in key.split("."):
        kind = get_type_hints(kind)[name]
    return kind


def _describe_type(kind: Any) -> str:
    """The values of a type, in words."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if get_origin(kind) is list:
        return f"a list, each item {_describe_type(arguments[0])}"
    if get_origin(kind) is tuple:
        return f"a list of {len(arguments)} items, each {_describe_type(arguments[0])}"
    if arguments:
        return " or ".join(_describe_type(one) for one in arguments)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return next(word for base, word in words.items() if issubclass(kind, base))


def _build(kind: type[Section], values: Mapping[str, Any]) -> Section:
    """A dataclass, its sections included, from nested values."""
    hints = get_type_hints(kind)
    arguments = {}
    for item in fields(kind):  # type: ignore[arg-type]
        value, hint = values[item.name], hints[item.name]
        arguments[item.name] = _build(hint, value) if isinstance(value, dict) else _plain(value)
    return kind(**arguments)


def _plain(value: Any) -> Any:
    """Numbers of jsonargparse's range types as int and float, also inside lists and tuples."""
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, int) else float(value)
