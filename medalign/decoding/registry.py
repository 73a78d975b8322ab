"""The decoding methods by name. A method is imported when it is chosen."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, NamedTuple

from medalign.errors import ConfigError
from medalign.import_path import import_object

if TYPE_CHECKING:
    from medalign.decoding.base import Method

OPTION = "--decoding"


class Entry(NamedTuple):
    """A packaged method.

    Attributes:
        path: import path of its class.
        summary: one line for the help.
        cost: forward passes, in words.
    """

    path: str
    summary: str
    cost: str


METHODS: dict[str, Entry] = {
    "greedy": Entry("medalign.decoding.base:Greedy", "the most probable token", "1 per token"),
    "vcd": Entry("medalign.decoding.methods.vcd:VCD", "VCD: contrast with the image under noise", "2 per token"),
    "m3id": Entry("medalign.decoding.methods.m3id:M3ID", "M3ID: contrast with no image, growing", "2 per token"),
    "avisc": Entry("medalign.decoding.methods.avisc:AvisC", "AvisC: contrast with its blind tokens", "2 per token"),
    "damro": Entry(
        "medalign.decoding.methods.damro:DAMRO", "DAMRO: contrast with the tower's outlier tokens", "2 per token"
    ),
    "imccd": Entry(
        "medalign.decoding.methods.imccd:IMCCD", "IMCCD: contrast with distorted values of the image", "2 per token"
    ),
    "second": Entry(
        "medalign.decoding.methods.second:SECOND",
        "SECOND: contrast of the image at several scales, with selected tokens",
        "1 per token, and prompts whose selection changes",
    ),
    "medvcd": Entry(
        "medalign.decoding.methods.medvcd:MedVCD",
        "Med-VCD: contrast with the last token's embedding, in answers with merged tokens",
        "1 per token",
    ),
    "dola": Entry("medalign.decoding.methods.dola:DoLa", "DoLa: contrast with an earlier block", "1 per token"),
    "pai": Entry("medalign.decoding.methods.pai:PAI", "PAI: amplified attention to the image", "2 per token"),
    "vhr": Entry(
        "medalign.decoding.methods.vhr:VHR",
        "VHR: attention heads that the image changes are reinforced",
        "1 per token, and 1 of the text",
    ),
    "cai": Entry(
        "medalign.decoding.methods.cai:CAI",
        "CAI: heads that respond to requests for a description are shifted as one would shift them",
        "1 per token, after 128 prompts",
    ),
    "opera": Entry(
        "medalign.decoding.methods.opera:OPERA",
        "OPERA: beam search with a penalty on over-trusted tokens, and returns",
        "1 per token, of 25 rows",
    ),
}
"""Every packaged method by its name."""


def find_method(name: str) -> type[Method]:
    """Import a method.

    Args:
        name: the name of a packaged method, or the import path `package.module:Class` of a method of another package.

    Raises:
        ConfigError: there is no such method.
    """
    from medalign.decoding.base import Method

    if name not in METHODS and ":" not in name:
        raise ConfigError(
            f"{OPTION} {name!r} is not a method; choose one of {', '.join(METHODS)}, or give the import path of "
            "your own as package.module:Class"
        )
    path = METHODS[name].path if name in METHODS else name
    found = import_object(path, OPTION)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"{OPTION} {name!r} is not a subclass of medalign.decoding.base.Method; give one that is")
    if inspect.isabstract(found) or not hasattr(found, "name"):
        raise ConfigError(f"{OPTION} {name!r} is a base of methods without a name of its own; give a subclass")
    return found
