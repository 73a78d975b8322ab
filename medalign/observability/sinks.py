"""Where the numbers of a run go: the terminal, a JSONL file, Weights & Biases. Only rank 0 makes sinks."""

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
    """Takes the numbers of a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def plain_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values as Python numbers. Anything else (text, an image, a tensor) is a TypeError that names it."""
    for name, value in values.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"metric {name!r} is {type(value).__name__}; only numbers are logged")
    return {k: int(v) if isinstance(v, numbers.Integral) else float(v) for k, v in values.items()}


class JsonlSink:
    """One JSON object per row, flushed at once. A value that is not finite is written as null.

    Beside its numbers a row has `step` and `time`, when it was written (UTC, ISO 8601, milliseconds). W&B stamps its
    rows by itself.

    A run that goes on from `resumed_step` drops the rows after it, since it will write them again; a line that a
    kill cut off is dropped too. Any other line that is not a row is a DataError.
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
        row = {k: v if math.isfinite(v) else None for k, v in plain_numbers(values).items()}
        self._file.write(json.dumps({"step": step, "time": now, **row}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that a JsonlSink wrote, without a last line that was cut off."""
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
    """A progress bar in a terminal; elsewhere (a batch job's log) one line now and then.

    `tick` moves the bar at each step; `log` shows the last values. `bar=True` asks for a bar in any stream.
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
        self._unsaid: str | None = None
        shown = stream.isatty() if bar is None else bar
        self._bar = (
            tqdm(total=total, initial=start, file=stream, dynamic_ncols=True, unit="step", desc="train")
            if shown
            else None
        )

    def tick(self, step: int) -> None:
        """The step is done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        text = summary(plain_numbers(values))
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self.tick(step)
            return
        left = (self._clock() - self._began) / max(step - self._start, 1) * (self._total - step)
        self._unsaid = f"step {step}/{self._total}  {text}  left {duration(left)}"
        if self._clock() - self._last_line >= self._interval:
            self._say()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._say()

    def _say(self) -> None:
        if self._unsaid:
            log.info(self._unsaid)
            self._last_line = self._clock()
        self._unsaid = None


def summary(values: Mapping[str, float]) -> str:
    """The few numbers that a reader watches, short: every loss, the learning rate, the speed."""
    parts = [f"{name.removeprefix('loss/')} {values[name]:.4g}" for name in values if name.startswith("loss/")]
    if "optim/lr" in values:
        parts.append(f"lr {values['optim/lr']:.2e}")
    if "speed/samples_per_second" in values:
        parts.append(f"{values['speed/samples_per_second']:.3g} samples/s")
    return "  ".join(parts)


class WandbSink:
    """Weights & Biases, in the run's folder; the only door to wandb, which mode "off" does not even import.

    Nothing but numbers and the filtered configuration leaves: no code, git state, host, user, command line,
    requirements, system statistics or terminal output. `allow_media=True` lifts the check on values, for a caller
    who asks for pictures or text by name. The run's id is kept in the folder, so that a resumed run continues
    under it. When the service cannot be reached or refuses, one warning says so and the run goes on offline.
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
        allow_media: bool = False,
        init_timeout: float = 20.0,
        finish_timeout: float = 60.0,
    ) -> None:
        self._allow_media = allow_media
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

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if not self._allow_media:
            values = plain_numbers(values)
        if self._run is not None:
            self._guarded(lambda: self._run.log(dict(values), step=step))

    def close(self) -> None:
        if self._run is not None:
            self._guarded(self._run.finish)
            self._run = None

    def _guarded(self, call: Callable[[], object]) -> None:
        import wandb

        try:
            call()
        except (wandb.errors.Error, ConnectionError) as error:
            log.warning("W&B failed (%s); it is left out from here on, the JSONL file goes on", error)
            self._run = None


def _start_online(arguments: dict[str, Any], timeouts: tuple[float, float]) -> Any | None:
    import wandb

    try:
        if not wandb.login(prompt=False, verify=False):
            log.warning("W&B has no API key (`wandb login`, or WANDB_API_KEY): the run is logged offline")
            return None
        return _start({**arguments, "resume": "allow"}, timeouts, mode="online")
    except (wandb.errors.Error, TimeoutError, ConnectionError) as error:
        log.warning("W&B is out of reach (%s): the run is logged offline; send it later with `wandb sync`", error)
        wandb.teardown()  # its service process holds on to the run's id, which the offline run needs
        return None


def _start_offline(arguments: dict[str, Any], timeouts: tuple[float, float]) -> Any | None:
    import wandb

    try:
        return _start(arguments, timeouts, mode="offline")
    except wandb.errors.Error as error:
        log.warning("W&B cannot start (%s); only the JSONL file is written", error)
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
