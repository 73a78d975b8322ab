"""Weights & Biases as a destination of metrics that can neither end nor delay a run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from medalign.config.schema.run import WandbMode
from medalign.distributed import log
from medalign.observability.sinks import to_python_numbers
from medalign.observability.wandb_session import HistoryWriter, WandbSession

_MARGIN = 5.0  # seconds, beyond W&B's own time-outs


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
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if mode == "off":
            return
        import wandb  # noqa: F401 (in this thread: loader processes must not be forked in the middle of an import)

        self._thread = threading.Thread(target=self._serve, args=(mode, list(rows)), name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on the metrics of a step."""
        self._queue.put((step, to_python_numbers(values)))

    def close(self) -> None:
        """Wait until W&B has finished, or its time-outs are over."""
        if self._thread is None:
            return
        self._queue.put(None)
        limit = self._session.init_timeout + self._session.finish_timeout + _MARGIN
        self._thread.join(limit)
        if self._thread.is_alive():
            log.warning("W&B has not finished within %.0f s; %s", limit, self._remedy)
        self._thread = None

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
            step = rows[-1]["step"] if rows else 0
            while (item := self._queue.get()) is not None:
                step = item[0]
                writer.add(*item)
            if self._last_step is None or step >= self._last_step:
                writer.flush()
            run.finish()
        except Exception as error:  # noqa: BLE001 (W&B raises classes of its internals, and none may end the run)
            log.warning("W&B failed (%s: %s); %s", type(error).__name__, error, self._remedy)


def sync(session: WandbSession, rows: Iterable[Mapping[str, Any]]) -> int | None:
    """Send the rows that the run on the server does not have yet.

    Returns:
        The number of steps that were sent; None, after a warning, if the server cannot be reached.
    """
    run = session.start_online()
    if run is None:
        return None
    writer = HistoryWriter(run)
    writer.add_rows(rows)
    writer.flush()
    run.finish()
    return writer.written
