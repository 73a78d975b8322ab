"""How a start of a training ended, from the records of its ranks and the status of its launcher."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from medalign.errors import INTERRUPTED, USER_ERROR, Preempted, Terminated
from medalign.exit_records import ExitRecord

_STOPPED = (Preempted.status, Terminated.status, INTERRUPTED)


@dataclass(frozen=True)
class Verdict:
    """How a start ended.

    Attributes:
        status: exit status for whoever started the training.
        reason: why it did not succeed.
        crashed: whether the same command may continue it: no user needs to correct anything, and nobody asked for the
            end.
    """

    status: int
    reason: str
    crashed: bool = False


def judge(records: Sequence[ExitRecord], launcher: int, asked: signal.Signals | None) -> Verdict:
    """Return how a start ended.

    An error that the user can correct outranks everything else, since starting again would not help. Then comes a stop
    on request, on which all ranks have agreed. Whatever remains without the success of rank 0 is a crash, even if the
    launcher reports success.

    Args:
        records: what the ranks have left, the earliest end first.
        launcher: exit status of the launcher, negative for a signal.
        asked: the signal that asked the supervisor itself for the end.
    """
    for status in (USER_ERROR, *_STOPPED):
        for record in records:
            if record.status == status:
                return Verdict(status, f"rank {record.rank}: {record.reason}")
    if launcher == 0 and any(record.rank == 0 and record.status == 0 for record in records):
        return Verdict(0, "")
    if not records and launcher == USER_ERROR:
        return Verdict(USER_ERROR, "the launcher refused its command: see its message")
    if asked is None and not records and launcher in (128 + signal.SIGUSR1, -signal.SIGUSR1):
        asked = signal.SIGUSR1  # it has ended ranks that were not ready for it
    if asked is not None:
        status = Preempted.status if asked == signal.SIGUSR1 else 128 + asked
        return Verdict(status, f"{asked.name} asked for the end; the ranks have ended without a checkpoint")
    failed = [record for record in records if record.status]
    return Verdict(_status(launcher, failed), _describe_crash(records, failed, launcher), crashed=True)


def _status(launcher: int, failed: Sequence[ExitRecord]) -> int:
    if failed:
        return failed[0].status
    return 128 - launcher if launcher < 0 else launcher or 1


def _describe_crash(records: Sequence[ExitRecord], failed: Sequence[ExitRecord], launcher: int) -> str:
    if not records:
        return f"no rank has left a reason: they were killed, or did not start (exit status of the launcher {launcher})"
    silent = sorted(set(range(records[0].world)) - {record.rank for record in records})
    parts = [f"rank {failed[0].rank}: {failed[0].reason}"] if failed else []
    if silent:
        names = ", ".join(map(str, silent))
        parts.append(f"no reason from rank {names}: killed, out of memory, or on a node that has failed")
    return "; ".join(parts) or f"rank 0 has not ended (exit status of the launcher {launcher})"
