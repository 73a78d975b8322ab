"""Where the metrics of a run go."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from medalign.checkpoint.state import TrainState
from medalign.config import Config
from medalign.observability.console import ConsoleSink
from medalign.observability.environment import read_environment, write_environment
from medalign.observability.rows import JsonlSink, read_rows
from medalign.observability.wandb_session import WandbSession
from medalign.observability.wandb_sink import WandbSink
from medalign.run_folder import RunFolder
from medalign.training import schedule
from medalign.training.callbacks import ConsoleLogger, MetricLogger, WandbLogger


def build_loggers(config: Config, folder: Path, now: TrainState) -> list[MetricLogger]:
    """Open the callbacks that write the metrics of this run; only rank 0 calls it."""
    total, metrics = schedule.total_steps(config.train), RunFolder(folder).metrics
    jsonl = JsonlSink(metrics, resumed_step=now.step)
    write_environment(RunFolder(folder).environment)
    wandb = WandbSink(config.log.wandb, wandb_session(config, folder), rows=read_rows(metrics), last_step=total)
    return [
        ConsoleLogger(ConsoleSink(total, start=now.step)),
        MetricLogger(jsonl),
        WandbLogger(wandb),
    ]


def wandb_session(config: Config, folder: Path) -> WandbSession:
    """Return where the run goes in W&B, with its settings and the environment of its last start."""
    environment = read_environment(RunFolder(folder).environment)
    return WandbSession(folder, config.log, asdict(config) | ({"environment": environment} if environment else {}))
