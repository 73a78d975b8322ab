"""The latest metrics of runs, as a table in the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from medalign import config as settings
from medalign.errors import ConfigError, DataError
from medalign.observability.progress import duration
from medalign.observability.rows import read_rows
from medalign.run_folder import RunFolder

_ELAPSED, _TIME = "time/elapsed_seconds", "time"
_NOT_METRICS = ("step", _TIME, _ELAPSED)  # shown in lines of their own
_NONE = "-"
_COLUMN = 15  # characters of a run beside the names; a longer title is folded


@dataclass
class WatchedRun:
    """A run that is read again whenever its file of metrics has changed.

    Attributes:
        folder: the run's folder.
        title: how the run is named in the table.
        total: number of steps of the run; None if its settings do not state it.
        latest: the newest value of each metric; None for one that was not finite.
        step: steps done at the last row; None without rows.
        logged: when the last row was written; None if it does not state it.
        note: why there are no numbers; empty if there are.
    """

    folder: RunFolder
    title: str
    total: int | None = None
    latest: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    logged: datetime | None = None
    note: str = ""
    _seen: tuple[int, int] | None = None

    def refresh(self) -> bool:
        """Read the run's rows if they have changed. Returns whether they have."""
        try:
            found = self.folder.metrics.stat()
        except FileNotFoundError:
            changed, self.note, self._seen = not self.note, "no row yet", None
            return changed
        if (found.st_mtime_ns, found.st_size) == self._seen:
            return False
        self._seen = found.st_mtime_ns, found.st_size
        self.total = _total_steps(self.folder)
        try:
            rows = read_rows(self.folder.metrics)
        except DataError as error:
            self.note = str(error)
        else:
            self._take(rows)
        return True

    def _take(self, rows: Sequence[dict[str, Any]]) -> None:
        self.latest = {name: value for row in rows for name, value in row.items()}
        self.step = max((row["step"] for row in rows), default=None)
        self.logged = _parse_time(self.latest.get(_TIME))
        self.note = "" if rows else "no row yet"

    def lines(self, now: datetime) -> dict[str, str]:
        """Return the lines that every run has."""
        done, elapsed = self.step, self.latest.get(_ELAPSED)
        left = None
        if done and self.total and isinstance(elapsed, int | float):
            left = elapsed / done * (self.total - done)
        return {
            "step": _NONE if done is None else f"{done}/{self.total}" if self.total else str(done),
            "last row": f"{duration((now - self.logged).total_seconds())} ago" if self.logged else _NONE,
            "elapsed": duration(elapsed) if isinstance(elapsed, int | float) else _NONE,
            "left": _NONE if left is None else duration(left),
        }


def watch(
    paths: Sequence[Path],
    console: Console,
    *,
    once: bool = False,
    interval: float = 2.0,
    metrics: Sequence[str] = (),
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the latest metrics of runs until the user interrupts.

    In a terminal the table is redrawn in place. Elsewhere it is written again whenever a run has new rows.

    Args:
        paths: folders of the runs. A run may have no row yet.
        console: where the table is drawn.
        once: draw the table one time.
        interval: seconds between two looks at the files.
        metrics: show only metrics whose name begins with one of these; all by default.
        sleep: waits.

    Raises:
        DataError: a folder does not exist.
    """
    runs = _open(paths)
    _refresh(runs)
    if once:
        console.print(tables(runs, metrics, console.width))
        return
    try:
        if console.is_terminal:
            with Live(tables(runs, metrics, console.width), console=console, auto_refresh=False) as live:
                while True:
                    sleep(interval)
                    _refresh(runs)
                    live.update(tables(runs, metrics, console.width), refresh=True)
        console.print(tables(runs, metrics, console.width))
        while True:
            sleep(interval)
            if _refresh(runs):
                console.print(tables(runs, metrics, console.width))
    except KeyboardInterrupt:  # how a watch ends
        return


def tables(runs: Sequence[WatchedRun], metrics: Sequence[str], width: int) -> Group:
    """Build one table or, where the runs do not fit beside each other in `width` characters, several."""
    names = [*runs[0].lines(datetime.now(UTC)), *_metric_names(runs, metrics)]
    beside = max(1, (width - max(map(len, names))) // _COLUMN)
    return Group(*(table(runs[first : first + beside], metrics) for first in range(0, len(runs), beside)))


def table(runs: Sequence[WatchedRun], metrics: Sequence[str] = (), now: datetime | None = None) -> Table:
    """Build the table: one column per run, one line per metric that any run has."""
    now = now or datetime.now(UTC)
    drawn = Table(box=box.SIMPLE, pad_edge=False)
    drawn.add_column("", no_wrap=True, min_width=max(map(len, _metric_names(runs, metrics)), default=0))
    for run in runs:
        drawn.add_column(run.title, justify="right", overflow="fold")
    shared = [run.lines(now) for run in runs]
    for name in shared[0]:
        drawn.add_row(name, *(lines[name] for lines in shared), style="bold" if name == "step" else None)
    drawn.add_section()
    for name in _metric_names(runs, metrics):
        drawn.add_row(name, *(_format(run.latest[name]) if name in run.latest else _NONE for run in runs))
    if any(run.note for run in runs):
        drawn.add_section()
        drawn.add_row("note", *(run.note for run in runs))
    return drawn


def _refresh(runs: Sequence[WatchedRun]) -> bool:
    """Read every run again. Returns whether one has changed."""
    changed = [run.refresh() for run in runs]
    return any(changed)


def _metric_names(runs: Sequence[WatchedRun], prefixes: Sequence[str]) -> list[str]:
    """Return the names by group (the part before the first slash), in the order in which runs logged them."""
    found = dict.fromkeys(name for run in runs for name in run.latest if name not in _NOT_METRICS)
    names = [name for name in found if not prefixes or name.startswith(tuple(prefixes))]
    groups = list(dict.fromkeys(name.partition("/")[0] for name in names))
    return sorted(names, key=lambda name: groups.index(name.partition("/")[0]))


def _format(value: Any) -> str:
    if value is None:
        return "not finite"
    if not isinstance(value, int | float):
        return str(value)
    return str(value) if isinstance(value, int) or math.isnan(value) else f"{value:.4g}"


def _open(paths: Sequence[Path]) -> list[WatchedRun]:
    for path in paths:
        if not path.is_dir():
            raise DataError(f"run folder {path} does not exist; give the --run.dir of a training")
    names = [path.resolve().name for path in paths]
    titles = names if len(set(names)) == len(names) else [str(path) for path in paths]
    return [WatchedRun(RunFolder(path), title) for path, title in zip(paths, titles, strict=True)]


def _total_steps(folder: RunFolder) -> int | None:
    """Return train.steps; None where the length is in epochs, or where the settings cannot be read."""
    try:
        return settings.read(folder.config).train.steps
    except ConfigError:
        return None


def _parse_time(text: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
