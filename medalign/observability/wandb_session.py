"""Starting a run of Weights & Biases, and writing a history of steps into it.

Only metrics and the filtered configuration are sent: no code, git state, host, user, command line, requirements,
terminal output or telemetry of the library, and system statistics only if they are wanted. The run's id is stored in
the run's folder, so that every start continues the same run.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from medalign.config.schema.run import LogConfig
from medalign.distributed import log
from medalign.observability.files import write_text
from medalign.observability.metrics import STEP_METRIC
from medalign.observability.privacy import public_config
from medalign.run_folder import RunFolder

_NOT_METRICS = ("step", "time")  # fields of a row of metrics.jsonl


@dataclass(frozen=True)
class WandbSession:
    """Where a run goes in W&B.

    Args:
        run_dir: the run's folder, which holds W&B's files and the run's id.
        settings: project, names and tags of the run; its name is its id by default.
        config: the run's configuration, which is filtered by `public_config`.
        init_timeout: seconds to wait for the service at the start.
        finish_timeout: seconds to wait for it at the end.
    """

    run_dir: Path
    settings: LogConfig = field(default_factory=LogConfig)
    config: Mapping[str, Any] = field(default_factory=dict)
    init_timeout: float = 20.0
    finish_timeout: float = 20.0

    def start_online(self) -> Any | None:
        """Start or continue the run on the server; None, after a warning, if that is not possible."""
        import wandb

        try:
            wandb.setup(settings=self._library_settings())
            if not wandb.login(prompt=False, verify=False):
                log.warning("no W&B API key found (use `wandb login` or WANDB_API_KEY): the run is logged offline")
                return None
            return self._start("online", resume="allow")
        except (wandb.errors.Error, TimeoutError, ConnectionError) as error:
            log.warning(
                "W&B cannot be reached (%s): the run is logged offline; send it later with `medalign wandb sync %s`",
                error,
                self.run_dir,
            )
            end_service()  # it keeps the run's id, which the offline run needs
            return None

    def start_offline(self) -> Any | None:
        """Start a run that is kept in the run's folder; None, after a warning, if that is not possible."""
        import wandb

        try:
            return self._start("offline")
        except wandb.errors.Error as error:
            log.warning("W&B cannot be started (%s); metrics are written only to the JSONL file", error)
            return None

    def _start(self, mode: Literal["offline", "online"], **arguments: Any) -> Any:
        import wandb

        identity, given = run_id(self.run_dir), self.settings
        run = wandb.init(
            project=given.project,
            entity=given.entity,
            name=given.name or identity,
            group=given.group,
            job_type=given.job_type,
            tags=given.tags or None,
            notes=given.notes,
            id=identity,
            dir=str(self.run_dir),
            config=public_config(self.config),
            reinit="create_new",
            mode=mode,
            settings=self._library_settings(),
            **arguments,
        )
        run.define_metric(STEP_METRIC, hidden=True)
        run.define_metric("*", step_metric=STEP_METRIC, step_sync=False)
        return run

    def _library_settings(self) -> Any:
        import wandb

        # Errors of the library would be reported with their stacks, which contain paths.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        return wandb.Settings(
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
            x_disable_stats=not self.settings.system_metrics,
            x_save_requirements=False,
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
        )


class HistoryWriter:
    """Writes one record per step. W&B takes steps in ascending order only, and never a step again.

    Steps that the run already has are left out: after a kill the trainer takes them again, with the same numbers.

    Args:
        run: a run of wandb.
    """

    def __init__(self, run: Any) -> None:
        self.written = 0
        self._run = run
        self._first = int(run.starting_step)
        self._step = -1
        self._values: dict[str, float] = {}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add metrics of a step. They are written once metrics of a later step arrive."""
        if step != self._step:
            self.flush()
        self._step = step
        self._values |= values

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of metrics.jsonl."""
        for row in rows:
            values = {k: math.nan if v is None else v for k, v in row.items() if k not in _NOT_METRICS}
            self.add(row["step"], values)

    def flush(self) -> None:
        """Write the metrics of the last step."""
        if self._values and self._step >= self._first:
            self._run.log(self._values | {STEP_METRIC: self._step}, step=self._step)
            self.written += 1
        self._values = {}


def run_id(run_dir: Path) -> str:
    """Return the id of a run in W&B, which is chosen at the first call: by the agent of a sweep, or at random."""
    path = RunFolder(run_dir).wandb_run_id
    if not path.exists():
        of_sweep = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        write_text(path, (of_sweep or secrets.token_hex(4)) + "\n")
    return path.read_text().strip()


def end_service() -> None:
    """End the process of this one that talks to the server, without waiting for what it has not sent.

    Otherwise a hook of the library would wait for it when this process exits, without limit.
    """
    import wandb

    def tear_down() -> None:
        with suppress(Exception, SystemExit):  # classes of the library's internals, and its wish to end this process
            wandb.teardown()

    waiting = threading.Thread(target=tear_down, daemon=True)
    waiting.start()  # it unregisters the hook, and then waits for the process
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it may have ended meanwhile
            if child.name().startswith("wandb-core"):
                child.kill()
    waiting.join(1.0)
