"""Destinations of a run's metrics: the terminal, a JSONL file, Weights & Biases. Only rank 0 creates sinks."""

from __future__ import annotations

import json
import math
import numbers
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from tqdm import tqdm

from medalign.config.schema import WandbMode
from medalign.distributed import log
from medalign.errors import DataError
from medalign.observability.files import write_text
from medalign.observability.privacy import public_config
from medalign.observability.progress import duration
from medalign.run_folder import RunFolder


class Sink(Protocol):
    """Destination of the metrics of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one step."""

    def close(self) -> None:
        """Finish writing."""


def to_python_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Convert metrics to Python numbers.

    Raises:
        TypeError: a value is not a number, such as text, an image or a tensor; the message names the metric.
    """
    for name, value in values.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"metric {name!r} is {type(value).__name__}; only numbers can be logged")
    return {k: int(v) if isinstance(v, numbers.Integral) else float(v) for k, v in values.items()}


class JsonlSink:
    """Writes one JSON object per row and flushes each row. A value that is not finite is written as null.

    Besides the metrics, a row contains `step` and `time`, the time of writing (UTC, ISO 8601, milliseconds).

    Args:
        path: the file.
        resumed_step: step from which the run resumes. Later rows are removed from the file, because the run writes
            them again. An incomplete last line, left by a kill, is removed too.
        clock: returns the current time.

    Raises:
        DataError: another line of the file is not a row.
    """

    def __init__(
        self, path: Path, *, resumed_step: int = 0, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._clock = clock
        kept = [json.dumps(row) for row in read_rows(path) if row["step"] <= resumed_step] if path.exists() else []
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = self._clock().isoformat(timespec="milliseconds")
        row = {k: v if math.isfinite(v) else None for k, v in to_python_numbers(values).items()}
        self._file.write(json.dumps({"step": step, "time": now, **row}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows that a JsonlSink wrote, except an incomplete last line.

    Raises:
        DataError: another line is not a row.
    """
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("a row is an object with an integer 'step'")
            rows.append(row)
        except ValueError as error:  # includes JSON and UTF-8 errors
            if number < len(lines):
                raise DataError(f"{path}, line {number}: {error}; remove the line, or the file") from error
    return rows


class ConsoleSink:
    """A progress bar in a terminal; elsewhere, such as in the log of a batch job, at most one line per interval.

    `tick` advances the progress bar at each step; `log` shows the latest metrics.

    Args:
        total: number of steps of the run.
        start: first step of this start of the run.
        bar: whether to draw a progress bar; by default only in a terminal.
        interval: minimum number of seconds between log lines.
        stream: where the progress bar is drawn; stderr by default.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        bar: bool | None = None,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = stream or sys.stderr
        self._total, self._start, self._interval, self._clock = total, start, interval, clock
        self._began = clock()
        self._last_line = -math.inf
        self._pending: str | None = None
        shown = stream.isatty() if bar is None else bar
        self._bar = (
            tqdm(total=total, initial=start, file=stream, dynamic_ncols=True, unit="step", desc="train")
            if shown
            else None
        )

    def tick(self, step: int) -> None:
        """Advance the progress bar to a completed step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        text = summary(to_python_numbers(values))
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self.tick(step)
            return
        left = (self._clock() - self._began) / max(step - self._start, 1) * (self._total - step)
        self._pending = f"step {step}/{self._total}  {text}  left {duration(left)}"
        if self._clock() - self._last_line >= self._interval:
            self._flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._flush()

    def _flush(self) -> None:
        if self._pending:
            log.info(self._pending)
            self._last_line = self._clock()
        self._pending = None


def summary(values: Mapping[str, float]) -> str:
    """Format the main metrics on one line: every loss, the learning rate, the speed."""
    parts = [f"{name.removeprefix('loss/')} {values[name]:.4g}" for name in values if name.startswith("loss/")]
    if "optim/lr" in values:
        parts.append(f"lr {values['optim/lr']:.2e}")
    if "speed/samples_per_second" in values:
        parts.append(f"{values['speed/samples_per_second']:.3g} samples/s")
    return "  ".join(parts)


class WandbSink:
    """Weights & Biases, with its files in the run's folder. This is the only class that imports wandb.

    Only metrics and the filtered configuration are sent: no code, git state, host, user, command line, requirements,
    system statistics or terminal output. The run's id is stored in the folder, so that a resumed run continues under
    the same id. If the service cannot be reached or rejects the run, one warning is logged and the run is logged
    offline.

    Args:
        mode: "off", "offline" or "online". With "off", wandb is not imported.
        run_dir: the run's folder.
        project: W&B project.
        entity: W&B user or team.
        name: name of the run; by default its id.
        config: the run's configuration, which is filtered by `public_config`.
        init_timeout: seconds to wait for the service at the start.
        finish_timeout: seconds to wait for it at the end.
    """

    def __init__(
        self,
        mode: WandbMode,
        run_dir: Path,
        *,
        project: str = "medalign",
        entity: str | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        init_timeout: float = 20.0,
        finish_timeout: float = 60.0,
    ) -> None:
        self._run: Any = None
        if mode == "off":
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        identity = _run_id(RunFolder(run_dir).wandb_run_id)
        arguments: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name or identity,
            "id": identity,
            "dir": str(run_dir),
            "config": public_config(config or {}),
            "reinit": "create_new",
        }
        timeouts = (init_timeout, finish_timeout)
        if mode == "online":
            self._run = _start_online(arguments, timeouts)
        if self._run is None:
            self._run = _start_offline(arguments, timeouts)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        numbers_only = to_python_numbers(values)
        if self._run is not None:
            self._guarded(lambda: self._run.log(numbers_only, step=step))

    def close(self) -> None:
        if self._run is not None:
            self._guarded(self._run.finish)
            self._run = None

    def _guarded(self, call: Callable[[], object]) -> None:
        import wandb

        try:
            call()
        except (wandb.errors.Error, ConnectionError) as error:
            log.warning("W&B failed (%s); logging continues only in the JSONL file", error)
            self._run = None


def _start_online(arguments: dict[str, Any], timeouts: tuple[float, float]) -> Any | None:
    import wandb

    try:
        if not wandb.login(prompt=False, verify=False):
            log.warning("no W&B API key found (use `wandb login` or WANDB_API_KEY): the run is logged offline")
            return None
        return _start({**arguments, "resume": "allow"}, timeouts, mode="online")
    except (wandb.errors.Error, TimeoutError, ConnectionError) as error:
        log.warning("W&B cannot be reached (%s): the run is logged offline; upload it later with `wandb sync`", error)
        wandb.teardown()  # its service process keeps the run's id, which the offline run needs
        return None


def _start_offline(arguments: dict[str, Any], timeouts: tuple[float, float]) -> Any | None:
    import wandb

    try:
        return _start(arguments, timeouts, mode="offline")
    except wandb.errors.Error as error:
        log.warning("W&B cannot be started (%s); metrics are written only to the JSONL file", error)
        return None


def _start(arguments: dict[str, Any], timeouts: tuple[float, float], *, mode: Literal["offline", "online"]) -> Any:
    import wandb

    init_timeout, finish_timeout = timeouts
    settings = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        host="",
        program="",
        save_code=False,
        silent=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=init_timeout,
        finish_timeout=finish_timeout,
    )
    return wandb.init(**arguments, mode=mode, settings=settings)


def _run_id(path: Path) -> str:
    if not path.exists():
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()
