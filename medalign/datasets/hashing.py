"""Identifiers as keyed hashes. With the same salt, equal names have equal hashes; without it, nothing is revealed.

The hash is HMAC-SHA256, truncated to 128 bits, in hexadecimal. The salt is a file: the user's own, or 32 random bytes
created next to the output and readable only by its owner. Anyone with the salt can test guesses of a name, so do not
distribute it with the shards.
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

_MIN_SALT_BYTES = 16


@dataclass(frozen=True)
class Hashing:
    """How identifiers are hashed: the salt, and the fields with identifiers in addition to the key."""

    salt: bytes
    fields: frozenset[str] = IDENTIFIERS

    def name(self, value: str) -> str:
        """Return the hash of a name, 32 hexadecimal digits."""
        return hmac.new(self.salt, value.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]

    def record(self, record: Record) -> Record:
        """Return the record with hashed key and identifying fields; empty values stay empty."""
        fields = {name: self._value(v) if name in self.fields else v for name, v in record.fields.items()}
        return replace(record, key=self.name(record.key), fields=fields)

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(one) for one in value]
        return value if is_missing(value) else self.name(str(value))


def read_salt(path: Path) -> bytes:
    """Read the salt from a file. Raises ConfigError if it is missing or too short to protect the names."""
    try:
        salt = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"the salt {path} cannot be read: {error.strerror}") from error
    if len(salt) < _MIN_SALT_BYTES:
        raise ConfigError(f"the salt {path} has {len(salt)} bytes; at least {_MIN_SALT_BYTES} are required")
    return salt


def default_salt(output: Path) -> Path:
    """Return `OUTPUT.salt` next to the output. It is created only once, so later runs give the same hashes."""
    path = output.absolute().with_name(output.absolute().name + ".salt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    except (FileExistsError, NotADirectoryError):
        pass  # if the folder cannot be created, reading the salt reports it
    return path
