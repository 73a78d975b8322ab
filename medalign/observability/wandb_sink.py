"""Weights & Biases as a destination of metrics that can neither end nor delay a run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from medalign.config.schema.run import WandbMode
from medalign.distributed import log
from medalign.observability.sinks import to_python_numbers
from medalign.observability.wandb_session import HistoryWriter, WandbSession, end_service

_MARGIN = 5.0  # seconds, beyond W&B's own time-outs
_BRIEFLY = 5.0  # seconds for W&B where something else ends the process soon


@dataclass(frozen=True)
class _Alert:
    title: str
    text: str
    level: Literal["INFO", "WARN", "ERROR"]


@dataclass(frozen=True)
class _End:
    status: int
    preempted: bool


class WandbSink:
    """Hands metrics to a thread that talks to Weights & Biases.

    The thread starts the run, online or, if the service cannot be reached, offline. It first writes the rows of
    earlier starts that the run does not have yet, and then each new one. If W&B fails, one warning is logged and the
    training continues; metrics.jsonl has every row, and `medalign wandb sync` sends them.

    Args:
        mode: "off", "offline" or "online". With "off", wandb is not imported.
        session: where the run goes.
        rows: rows of metrics.jsonl from earlier starts.
        last_step: last step of the run. At the end of a start, metrics of an earlier step are held back, because the
            next start may add to them. None: they are never held back.
    """

    def __init__(
        self,
        mode: WandbMode,
        session: WandbSession,
        *,
        rows: Iterable[Mapping[str, Any]] = (),
        last_step: int | None = None,
    ) -> None:
        self._session, self._last_step = session, last_step
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | _Alert | _End] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._abandoned = False
        if mode == "off":
            return
        import wandb  # noqa: F401 (in this thread: loader processes must not be forked in the middle of an import)

        self._thread = threading.Thread(target=self._serve, args=(mode, list(rows)), name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on the metrics of a step."""
        numbers = to_python_numbers(values)
        if self._thread is not None:
            self._queue.put((step, numbers))

    def alert(self, title: str, text: str, level: Literal["INFO", "WARN", "ERROR"]) -> None:
        """Hand on an alert, which W&B sends by e-mail or Slack as its user has set.

        Args:
            title: at most 64 characters.
            text: what has happened. It leaves the machine: no path, and no name of a sample.
            level: how serious it is.
        """
        if self._thread is not None:
            self._queue.put(_Alert(title, text, level))

    def close(self, status: int = 0, preempted: bool = False, briefly: bool = False) -> None:
        """Wait until W&B has finished, or its time-outs are over. Later calls do nothing.

        Args:
            status: exit status of the process; W&B shows a run as failed unless it is 0.
            preempted: whether the run will be continued.
            briefly: wait for a few seconds only, because the process may be killed soon.
        """
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        self._queue.put(_End(status, preempted))
        limit = _BRIEFLY if briefly else self._session.init_timeout + self._session.finish_timeout + _MARGIN
        thread.join(limit)
        if thread.is_alive():
            self._abandoned = True
            log.warning("W&B has not finished within %.0f s; %s", limit, self._remedy)
            end_service()

    @property
    def _remedy(self) -> str:
        return f"every row is in metrics.jsonl, and `medalign wandb sync {self._session.run_dir}` sends them"

    def _serve(self, mode: WandbMode, rows: list[Mapping[str, Any]]) -> None:
        """Talk to W&B, in the thread."""
        try:
            run = self._session.start_online() if mode == "online" else None
            run = run or self._session.start_offline()
            if run is None:
                return
            writer = HistoryWriter(run)
            writer.add_rows(rows)
            end = self._forward(run, writer, step=rows[-1]["step"] if rows else 0)
            if end.preempted:
                run.mark_preempting()
            run.finish(exit_code=end.status)
        except Exception as error:  # noqa: BLE001 (W&B raises classes of its internals, and none may end the run)
            if not self._abandoned:
                log.warning("W&B failed (%s: %s); %s", type(error).__name__, error, self._remedy)
                end_service()

    def _forward(self, run: Any, writer: HistoryWriter, step: int) -> _End:
        """Forward what is in the queue until the run ends."""
        while not isinstance(item := self._queue.get(), _End):
            if isinstance(item, _Alert):
                run.alert(item.title, item.text, item.level)
                continue
            step = item[0]
            writer.add(*item)
        if self._last_step is None or step >= self._last_step:
            writer.flush()
        return item


def sync(
    session: WandbSession, rows: Iterable[Mapping[str, Any]], summary: Mapping[str, float] | None = None
) -> int | None:
    """Send the rows that the run on the server does not have yet.

    Args:
        session: where the run goes.
        rows: rows of metrics.jsonl.
        summary: numbers about the whole run, which replace those of earlier calls.

    Returns:
        The number of steps that were sent; None, after a warning, if the server cannot be reached.
    """
    run = session.start_online()
    if run is None:
        return None
    writer = HistoryWriter(run)
    writer.add_rows(rows)
    writer.flush()
    run.summary.update(dict(summary or {}))
    try:
        run.finish()
    except TimeoutError as error:
        log.warning("W&B has not taken everything in time (%s)", error)
        return None
    return writer.written
