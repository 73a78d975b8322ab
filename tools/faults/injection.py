"""The faults: signals to ranks, and damage to the newest checkpoint."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from medalign.run_folder import RunFolder
from tools.faults.starts import Start
from tools.faults.summary import Trial

STEP_TIMEOUT = 6  # seconds; the watchdog ends a run with a rank that is stopped in a step
SAVE_TIMEOUT = 90  # seconds; or in a checkpoint, or in the start
_PATIENCE = 240.0  # seconds; a run that takes longer to end has not survived
_GRACE = 20.0  # seconds between the end of the rank that was signaled and that of the others
_STATUS = {"TERM": 143, "USR1": 75, "STOP": 124}
KINDS = ("KILL of a rank", "KILL of all ranks", "TERM", "USR1", "STOP", "damaged checkpoint")


def applicable(world: int, starting: bool, folder: RunFolder) -> list[str]:
    """Return the kinds that make sense now.

    A rank that is stopped needs another one to notice, after the start; damage needs a checkpoint before the newest.
    """
    senseless = set()
    if world == 1:
        senseless |= {"KILL of a rank", "STOP"}
    if starting:
        senseless |= {"STOP"}
    if len(folder.checkpoints.by_step()) < 2:
        senseless |= {"damaged checkpoint"}
    return [kind for kind in KINDS if kind not in senseless]


def inject(kind: str, start: Start, folder: RunFolder, draw: random.Random) -> Trial:
    """Inject a fault and wait until all ranks have ended.

    Returns:
        What happened: the exit status of each rank, the damage, and the seconds from the signal to a checkpoint that
        `latest` names and to the end of the last rank.
    """
    if kind == "damaged checkpoint":
        return {"status": start.kill(), "damage": damage(folder, draw)}
    if kind == "KILL of all ranks":
        return {"status": start.kill()}
    rank = draw.randrange(len(start.ranks))
    sent = time.time()
    start.send(signal.Signals["SIG" + kind.split()[0]], rank)
    if kind == "KILL of a rank":
        start.ranks[rank].join()
        return {"status": start.kill()}
    if kind == "STOP":
        start.ranks[1 - rank].join(_PATIENCE)
        return {"status": start.kill(), "seconds_to_end": round(time.time() - sent, 2)}
    start.ranks[rank].join(_PATIENCE)
    in_time = start.wait(_GRACE)
    found: Trial = {"seconds_to_end": round(time.time() - sent, 2)} if in_time else {}
    latest = folder.checkpoints.latest
    if in_time and latest.is_file() and latest.stat().st_mtime > sent:
        found["seconds_to_checkpoint"] = round(latest.stat().st_mtime - sent, 2)
    return {"status": start.kill(), **found}


def expected_status(kind: str, status: list[int | None], starting: bool) -> bool:
    """Return whether the ranks ended as the documentation says.

    In its start, before it has handlers, the rank that is signaled ends at once, and a launcher kills the others.
    """
    if kind not in _STATUS:
        return True
    if starting:
        return any(code in (_STATUS[kind], -signal.Signals[f"SIG{kind}"]) for code in status)
    return _STATUS[kind] in status if kind == "STOP" else set(status) == {_STATUS[kind]}


def damage(folder: RunFolder, draw: random.Random) -> str:
    """Damage the newest checkpoint, or `latest`, as a failing disk does; returns what was done."""
    checkpoints = folder.checkpoints
    form = draw.choice(("flip", "cut", "empty", "remove", "latest lost", "latest zeroed"))
    if form == "latest lost":
        checkpoints.latest.unlink(missing_ok=True)
    elif form == "latest zeroed":
        checkpoints.latest.write_bytes(bytes(12))
    else:
        newest = list(checkpoints.by_step().values())[-1]
        file = draw.choice(sorted(path for path in newest.path.rglob("*") if path.is_file()))
        _damage_file(file, form, draw)
        form = f"{form} {file.relative_to(newest.path)}"
    return form


def _damage_file(file: Path, form: str, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if form == "remove":
        file.unlink()
    elif form == "flip" and content:
        content[draw.randrange(len(content))] ^= 0xFF
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2] if form == "cut" else b"")
