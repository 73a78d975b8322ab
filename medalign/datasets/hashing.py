"""Identifiers as keyed hashes: the same name gives the same hash under one salt, and nothing without the salt.

HMAC-SHA256, cut to 128 bits, in hexadecimal. The salt is a file: the user's own, or one of 32 random bytes that is
made beside the output and readable by its owner alone. Who has the salt can test guesses of a name, so it must not
travel with the shards.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medalign.data.shards.records import Record
from medalign.datasets.base import IDENTIFIERS
from medalign.datasets.texts import is_missing
from medalign.errors import ConfigError

_SHORTEST_SALT = 16  # bytes


@dataclass(frozen=True)
class Hashing:
    """How names are hashed: the salt, and the fields beside the key whose values are names."""

    salt: bytes
    fields: frozenset[str] = IDENTIFIERS

    def name(self, value: str) -> str:
        """32 hexadecimal digits."""
        return hmac.new(self.salt, value.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]

    def record(self, record: Record) -> Record:
        """The record with key and identifying fields hashed; empty values stay empty."""
        fields = {name: self._value(v) if name in self.fields else v for name, v in record.fields.items()}
        return replace(record, key=self.name(record.key), fields=fields)

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(one) for one in value]
        return value if is_missing(value) else self.name(str(value))


def read_salt(path: Path) -> bytes:
    """The salt of a file. Raises ConfigError for one that is missing or too short to keep names secret."""
    try:
        salt = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"the salt {path} cannot be read: {error.strerror}") from error
    if len(salt) < _SHORTEST_SALT:
        raise ConfigError(f"the salt {path} has {len(salt)} bytes; at least {_SHORTEST_SALT} are needed")
    return salt


def own_salt(output: Path) -> Path:
    """`OUTPUT.salt` beside the output, made if it is not there yet, so that a second run gives the same hashes."""
    path = output.absolute().with_name(output.absolute().name + ".salt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    except (FileExistsError, NotADirectoryError):
        pass  # where no folder can be, reading it says so
    return path
