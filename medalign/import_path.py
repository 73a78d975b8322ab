"""Objects of other packages that a setting or an option gives by their import path."""

from __future__ import annotations

import importlib
from typing import Any

from medalign.errors import ConfigError


def import_object(path: str, setting: str) -> Any:
    """Import the object at a path.

    Args:
        path: `package.module.name` or `package.module:name`.
        setting: where the user gave the path, for the message.

    Returns:
        The object.

    Raises:
        ConfigError: the path is malformed, or there is no such module or name.
    """
    module, separator, name = path.rpartition(":" if ":" in path else ".")
    if not module or not name:
        raise ConfigError(f"{setting} {path!r} is not an import path such as package.module{separator or '.'}name")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{setting} {path!r} cannot be imported: {error}; install its package, or add its folder to PYTHONPATH"
        ) from error
