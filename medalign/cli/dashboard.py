"""`medalign dashboard`: the same panels in Weights & Biases for a whole team."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from medalign.cli.parser import Subparsers, add_command

log = logging.getLogger("medalign")


def register(subparsers: Subparsers) -> None:
    """Add the command to `medalign`."""
    parser = add_command(
        subparsers,
        "dashboard",
        run,
        "write a Weights & Biases workspace with a panel for each metric",
        "The workspace has a section for each kind of metric (loss, optim, speed, ...) with a panel for each metric\n"
        "that a run logs, over the steps of the run. Each call writes a new workspace. It needs wandb-workspaces:\n"
        'pip install "medalign[dashboard]".\n\n'
        "examples:\n"
        "  medalign dashboard chest --entity radiology\n"
        "  medalign dashboard chest --json workspace.json",
    )
    parser.add_argument("project", nargs="?", default="medalign", help="W&B project (default %(default)s)")
    parser.add_argument("--entity", metavar="TEAM", help="W&B user or team (default: the user who is logged in)")
    parser.add_argument("--name", default="medalign", help="name of the workspace (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the workspace to a file instead of a server")


def run(arguments: argparse.Namespace) -> int:
    """Write the workspace. Returns the exit status."""
    from medalign.observability.files import write_text
    from medalign.observability.wandb_dashboard import build_workspace, save_workspace, workspace_json

    if arguments.json:
        workspace = build_workspace(arguments.project, arguments.entity or "", arguments.name)
        write_text(arguments.json, workspace_json(workspace))
        log.info("the workspace is in %s", arguments.json)
    else:
        log.info("the workspace is at %s", save_workspace(arguments.project, arguments.entity, arguments.name))
    return 0
