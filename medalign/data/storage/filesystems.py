"""fsspec's file systems as reading shards wants them: one layer of retries, safe to fork, errors with a remedy."""

from __future__ import annotations

import importlib
import os
import sys
import weakref
from typing import Any

import fsspec
from fsspec.config import apply_config

from medalign.errors import ConfigError

# The errors of vendors are looked up only once their package is in use.
_FAILED = (
    ("builtins", "OSError"),
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("botocore.parsers", "ResponseParserError"),
)
_REFUSED = (
    ("builtins", "PermissionError"),
    ("botocore.exceptions", "NoCredentialsError"),
    ("botocore.exceptions", "PartialCredentialsError"),
    ("botocore.exceptions", "CredentialRetrievalError"),
    ("botocore.exceptions", "ProfileNotFound"),
)
_UNREACHED = (
    ("builtins", "ConnectionError"),
    ("builtins", "TimeoutError"),
    ("aiohttp", "ClientConnectionError"),
    ("botocore.exceptions", "ConnectionError"),
    ("botocore.exceptions", "HTTPClientError"),
)

# Closing what the parent opened would, in a forked process, take its sockets out of the event queue that both share:
# the parent would then wait for answers in vain. So every file system known at a fork lives on in the child, unused.
_made: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_inherited: list[Any] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_made.values()))


def open_system(place: str, connections: int) -> Any:
    """The file system of an address, an instance of its own, for so many reads at a time.

    It takes endpoint and credentials from where its vendor looks for them: the environment, ~/.aws, fsspec's own
    settings. Raises ConfigError where its package is missing or its endpoint is malformed.
    """
    scheme = place.partition("://")[0]
    is_s3 = scheme in ("s3", "s3a")
    try:
        kind = fsspec.get_filesystem_class(scheme)
        options = apply_config(kind, kind._get_kwargs_from_urls(place))  # such as the host of an sftp server
        if is_s3:
            options["config_kwargs"] = _s3_settings(connections) | options.get("config_kwargs", {})
        # No instance of fsspec's cache, for it may stem from the process that forked this one.
        system = kind(skip_instance_cache=True, **options)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{place} cannot be read: {error}; https needs pip install aiohttp, s3 pip install s3fs"
        ) from error
    _made[id(system)] = system
    if is_s3:
        system.retries = 1
        try:
            system.connect()
        except ValueError as error:
            raise ConfigError(
                f"{place} cannot be read: {error}; give AWS_ENDPOINT_URL the form https://host:port"
            ) from error
    return system


def _s3_settings(connections: int) -> dict[str, Any]:
    """Neither botocore nor s3fs (`retries`) tries again: their 5 x 5 tries would be made within each of ours."""
    return {"max_pool_connections": connections, "retries": {"total_max_attempts": 1}}


def failures() -> tuple[type[BaseException], ...]:
    """What counts as a failed read, to be tried again."""
    return _known(_FAILED)


def reason_of(error: BaseException, name: str) -> str:
    """Why it failed, in the words of the error, unless these merely repeat the name."""
    reason = str(getattr(error, "strerror", None) or error or type(error).__name__)
    return "there is no such file" if isinstance(error, FileNotFoundError) and reason in name else reason


def remedy_of(error: BaseException) -> str:
    """What to look at, as a question."""
    if isinstance(error, _known(_REFUSED)) or getattr(error, "status", None) in (401, 403):
        return "may this user, or may these credentials (s3: AWS_ACCESS_KEY_ID, AWS_PROFILE), read it?"
    if isinstance(error, _known(_UNREACHED)):
        return "is the server up, and the address right (s3: AWS_ENDPOINT_URL)?"
    return "was it moved, deleted or replaced?"


def _known(errors: tuple[tuple[str, str], ...]) -> tuple[type[BaseException], ...]:
    return tuple(getattr(importlib.import_module(module), name) for module, name in errors if module in sys.modules)
