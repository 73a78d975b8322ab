"""fsspec file systems configured for reading shards: one layer of retries, fork-safe, and errors with a remedy."""

from __future__ import annotations

import importlib
import os
import sys
import weakref
from typing import Any

import fsspec
from fsspec.config import apply_config

from medalign.errors import ConfigError

# Errors of optional packages are resolved only if the package is imported.
_FAILED = (
    ("builtins", "OSError"),
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("botocore.parsers", "ResponseParserError"),
)
_DENIED = (
    ("builtins", "PermissionError"),
    ("botocore.exceptions", "NoCredentialsError"),
    ("botocore.exceptions", "PartialCredentialsError"),
    ("botocore.exceptions", "CredentialRetrievalError"),
    ("botocore.exceptions", "ProfileNotFound"),
)
_UNREACHABLE = (
    ("builtins", "ConnectionError"),
    ("builtins", "TimeoutError"),
    ("aiohttp", "ClientConnectionError"),
    ("botocore.exceptions", "ConnectionError"),
    ("botocore.exceptions", "HTTPClientError"),
)

# Closing inherited connections in a forked process would remove their sockets from the event queue that both processes
# share, and the parent would wait forever. So file systems that exist at a fork are kept alive in the child, unused.
_open_systems: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_inherited: list[Any] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_open_systems.values()))


def open_system(place: str, connections: int) -> Any:
    """Open a new file system for an address.

    Endpoint and credentials come from the usual places: the environment, ~/.aws, the settings of fsspec.

    Args:
        place: an address that the file system will read.
        connections: number of concurrent reads.

    Raises:
        ConfigError: the package for this scheme is missing, or its endpoint is malformed.
    """
    scheme = place.partition("://")[0]
    is_s3 = scheme in ("s3", "s3a")
    try:
        kind = fsspec.get_filesystem_class(scheme)
        options = apply_config(kind, kind._get_kwargs_from_urls(place))  # for example the host of an sftp server
        if is_s3:
            options["config_kwargs"] = _s3_settings(connections) | options.get("config_kwargs", {})
        # An instance from the cache of fsspec may have been opened by the parent process.
        system = kind(skip_instance_cache=True, **options)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{place} cannot be read: {error}; https needs pip install aiohttp, s3 pip install s3fs"
        ) from error
    _open_systems[id(system)] = system
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
    """Disable the retries of botocore. With these and those of s3fs, each attempt would make 5 x 5 requests."""
    return {"max_pool_connections": connections, "retries": {"total_max_attempts": 1}}


def failures() -> tuple[type[BaseException], ...]:
    """Return the exceptions that count as a failed read and are retried."""
    return _imported(_FAILED)


def reason_of(error: BaseException, name: str) -> str:
    """Return why a read failed: the message of the error, unless it only repeats the name."""
    reason = str(getattr(error, "strerror", None) or error or type(error).__name__)
    return "there is no such file" if isinstance(error, FileNotFoundError) and reason in name else reason


def remedy_of(error: BaseException) -> str:
    """Return a hint for the user, as a question."""
    if isinstance(error, _imported(_DENIED)) or getattr(error, "status", None) in (401, 403):
        return "do this user or these credentials (s3: AWS_ACCESS_KEY_ID, AWS_PROFILE) have read access?"
    if isinstance(error, _imported(_UNREACHABLE)):
        return "is the server up, and is the address correct (s3: AWS_ENDPOINT_URL)?"
    return "was it moved, deleted or replaced?"


def _imported(errors: tuple[tuple[str, str], ...]) -> tuple[type[BaseException], ...]:
    return tuple(getattr(importlib.import_module(module), name) for module, name in errors if module in sys.modules)
