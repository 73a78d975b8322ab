"""The options of `medalign generate` and `medalign evaluate` that say how answers are decoded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import Field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from medalign.cli.parser import CommandParser
from medalign.cli.values import argument_type, count, positive, share, whole
from medalign.decoding.registry import METHODS, OPTION, find_method

if TYPE_CHECKING:
    from medalign.decoding.base import Decoding, Method

_DEFAULT = ["greedy"]
_SWITCH = {"true": True, "false": False}


def add_decoding(parser: CommandParser, *, several: bool) -> None:
    """Add --decoding, --max-new-tokens and the options of beam search and sampling.

    The settings of a method are added once it is chosen.

    Args:
        parser: of the command.
        several: whether the command takes several methods.
    """
    group = parser.add_argument_group("decoding", _describe_methods(parser.prog))
    group.add_argument(
        OPTION,
        nargs="+" if several else 1,
        default=_DEFAULT,
        metavar="NAME",
        help=f"{'one or more of these methods' if several else 'one of these methods'}, or package.module:Class "
        "(default greedy)",
    )
    group.add_argument(
        "--max-new-tokens", type=count, default=128, metavar="N", help="maximum tokens of an answer (default 128)"
    )
    group.add_argument("--num-beams", type=count, default=1, metavar="N", help="beam search with N beams")
    group.add_argument("--do-sample", action="store_true", help="sample from the nucleus")
    group.add_argument(
        "--top-p", type=share, default=1.0, metavar="P", help="probability of the nucleus, with --do-sample (default 1)"
    )
    group.add_argument(
        "--temperature",
        type=positive,
        default=1.0,
        metavar="T",
        help="divides the logits, with --do-sample (default 1)",
    )
    group.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="of --do-sample, and of methods with noise (default 0); an answer depends on the seed and its sample, not "
        "on the batch or the ranks",
    )
    parser.complete = _add_settings


def read_decodings(arguments: argparse.Namespace) -> list[Decoding]:
    """Return the settings of these options, one for each method.

    Raises:
        ConfigError: two options exclude each other, one has no effect, or a method is given twice.
    """
    from medalign.decoding.base import Decoding, settings_of
    from medalign.errors import ConfigError

    found: list[Decoding] = []
    kinds = [find_method(name) for name in arguments.decoding]
    for kind in kinds:
        # In a sweep, a seed for one method is allowed beside others that have no noise.
        idle = not (arguments.do_sample or kind.seeded) and any(each.seeded for each in kinds)
        given = {key: getattr(arguments, f"{kind.name}.{key}") for key in (item.name for item in settings_of(kind))}
        decoding = Decoding(
            max_new_tokens=arguments.max_new_tokens,
            num_beams=arguments.num_beams,
            do_sample=arguments.do_sample,
            top_p=arguments.top_p,
            temperature=arguments.temperature,
            seed=0 if idle else arguments.seed,
            method=kind(**{key: value for key, value in given.items() if value is not None}),
        )
        if decoding.method.name in [one.method.name for one in found]:
            raise ConfigError(f"{OPTION} names {decoding.method.name} twice; name each method once")
        found.append(decoding)
    return found


def _describe_methods(command: str) -> str:
    width = max(map(len, METHODS))
    lines = [f"  {name:{width}}  {entry.summary} ({entry.cost})" for name, entry in METHODS.items()]
    return "\n".join(
        [
            "Methods, with their cost in forward passes:",
            *lines,
            "",
            f"{command} {OPTION} NAME --help lists the settings of a method.",
        ]
    )


def _add_settings(parser: CommandParser, words: Sequence[str]) -> None:
    """Add the settings of the methods that the command line names."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(OPTION, nargs="*", default=_DEFAULT)
    kinds: list[type[Method]] = []
    for name in finder.parse_known_args(words)[0].decoding:
        if name in _DEFAULT:  # it has no settings, and its module need not be imported
            continue
        if (kind := find_method(name)) not in kinds:
            kinds.append(kind)
    if not kinds:
        return
    from medalign.decoding.base import settings_of

    settings = {kind: settings_of(kind) for kind in kinds}
    keys = [item.name for kind in kinds for item in settings[kind]]
    for key in {key for key in keys if keys.count(key) > 1}:
        longer = [f"{OPTION}.{kind.name}.{key}" for kind in kinds if key in (item.name for item in settings[kind])]
        parser.add_argument(f"{OPTION}.{key}", action=_Ambiguous, longer=longer, help=argparse.SUPPRESS)
    for kind in kinds:
        group = parser.add_argument_group(f"settings of {kind.name}")
        for item in settings[kind]:
            short = [f"{OPTION}.{item.name}"] if keys.count(item.name) == 1 else []
            _add_setting(partial(group.add_argument, *short, f"{OPTION}.{kind.name}.{item.name}"), kind, item)


def _add_setting(add: Callable[..., Any], kind: type[Method], item: Field[Any]) -> None:
    """Add an option, whose value is None if it is not given."""
    hint = get_type_hints(kind)[item.name]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    default = str(item.default).lower() if hint is bool else item.default
    text = f"{item.metadata['help']} ({f'default {default}' if default != '' else 'required'})".replace("%", "%%")
    if choices:
        add(dest=f"{kind.name}.{item.name}", choices=choices, help=text)
    elif hint is bool:
        add(dest=f"{kind.name}.{item.name}", type=argument_type(_switch), metavar="true|false", help=text)
    else:
        metavar = "TEXT" if hint is str else hint.__name__.upper()
        add(dest=f"{kind.name}.{item.name}", type=hint, metavar=metavar, help=text)


class _Ambiguous(argparse.Action):
    """Refuses the short option of a setting that several of the chosen methods have."""

    def __init__(self, *words: Any, longer: Sequence[str], **settings: Any) -> None:
        super().__init__(*words, **settings)
        self.longer = longer

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]} is a setting of several methods; write {' or '.join(self.longer)}")


def _switch(text: str) -> bool:
    """Parse true or false."""
    if text not in _SWITCH:
        raise ValueError(f"{text!r} is neither true nor false")
    return _SWITCH[text]
