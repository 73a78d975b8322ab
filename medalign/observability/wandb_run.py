"""Weights & Biases as a destination of metrics."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from medalign.config.schema import WandbMode
from medalign.distributed import log
from medalign.observability.files import write_text
from medalign.observability.privacy import public_config
from medalign.observability.sinks import to_python_numbers
from medalign.run_folder import RunFolder


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
        """Send the metrics of a step."""
        numbers_only = to_python_numbers(values)
        if self._run is not None:
            self._guarded(lambda: self._run.log(numbers_only, step=step))

    def close(self) -> None:
        """Finish the run in W&B."""
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
