"""Host memory while weights are read."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM, _MAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_SMALL, _LARGE = 1 << 20, 32 << 20  # bytes


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Let the C library return the memory of each freed tensor of at least 1 MiB to the system, inside the context.

    Under ZeRO-3 each weight is gathered, copied and freed beside its part that stays. glibc raises the size from which
    it maps memory separately, up to 32 MiB, once such a block is freed. From then on freed weights leave holes between
    the parts, which are not returned. After the context the sizes are those that glibc reaches by itself, because
    mapping memory again for each tensor would slow down training on a CPU. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda name, value: 0)
    mallopt(_MAP, _SMALL)
    try:
        yield
    finally:
        mallopt(_MAP, _LARGE)
        mallopt(_TRIM, 2 * _LARGE)
