"""What commands that run on several ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from medalign.errors import MedAlignError


@contextmanager
def status_on_all_ranks() -> Iterator[None]:
    """Let every rank return its own exit status if the context fails on all of them.

    When the first rank has ended, launchers send TERM to the others.
    """
    try:
        yield
    except MedAlignError:
        from medalign import distributed
        from medalign.stop_signals import ignore_stop_signals

        if distributed.world_size() > 1:
            ignore_stop_signals()
        raise
