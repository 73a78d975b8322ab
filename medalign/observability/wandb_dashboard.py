"""The workspace of a W&B project: a section for each kind of metric, a panel for each metric."""

from __future__ import annotations

import json
import re
from typing import Any

from medalign.errors import ConfigError
from medalign.observability.metrics import METRICS, STEP_METRIC, Metric

_NOT_DRAWN = ("job", "evaluation")  # numbers that do not change during a start


def build_workspace(project: str, entity: str, name: str) -> Any:
    """Build the workspace with a panel for each metric that a run logs. It needs no server.

    Args:
        project: W&B project.
        entity: W&B user or team.
        name: how the workspace is called.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError('wandb-workspaces is not installed; pip install "medalign[dashboard]"') from error

    def panel(metric: Metric) -> Any:
        title = f"{metric.name}, {metric.unit}" if metric.unit else metric.name
        if "{" in metric.name:
            return reports.LinePlot(title=title, x=STEP_METRIC, metric_regex=metric.pattern)
        return reports.LinePlot(title=title, x=STEP_METRIC, y=[metric.name])

    groups: dict[str, list[Any]] = {}
    for metric in METRICS:
        groups.setdefault(metric.name.split("/")[0], []).append(panel(metric))
    sections = [
        workspaces.Section(name=group, panels=panels, is_open=True)
        for group, panels in groups.items()
        if group not in _NOT_DRAWN
    ]
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)


def workspace_json(workspace: Any) -> str:
    """Return the workspace as W&B stores it."""
    spec: str = workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    # The library numbers the panels and the set of runs at random, which would make each output another one.
    return json.dumps(json.loads(re.sub(r'"(__id__|id)":"[a-z0-9]{8,}"', r'"\1":""', spec)), indent=2) + "\n"


def save_workspace(project: str, entity: str | None, name: str) -> str:
    """Write the workspace to the server, and return its address.

    Args:
        project: W&B project.
        entity: W&B user or team; None is the one of the user who is logged in.
        name: how the workspace is called.

    Raises:
        ConfigError: there is no login, the server cannot be reached, or it refuses the workspace.
    """
    import wandb

    try:
        owner = entity or wandb.Api().default_entity
        if not owner:
            raise ConfigError("no W&B user is known; give --entity")
        workspace = build_workspace(project, owner, name)
        workspace.save()
        return str(workspace.url)
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise ConfigError(
            f"the workspace was not written ({error}); log in with `wandb login`, check the network and the name of "
            "the project, or write it to a file with --json"
        ) from error
