"""The workspace has a panel for each metric that a run logs."""

from __future__ import annotations

import json
import re

import pytest
import wandb

from medalign.cli.main import main
from medalign.observability.metrics import METRICS, STEP_METRIC, find_metric
from medalign.observability.wandb_session import end_service
from tests.fake_wandb import fake_wandb


def panels(spec: dict) -> list[dict]:
    sections = spec["section"]["panelBankConfig"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"]]


def check(spec: dict) -> None:
    """Each metric has one panel, over the step metric, and no panel is of another metric."""
    found = panels(spec)
    groups = dict.fromkeys(metric.name.split("/")[0] for metric in METRICS)
    drawn = [m for group in groups for m in METRICS if m.name.startswith(f"{group}/")]
    drawn = [metric for metric in drawn if not metric.name.startswith(("job/", "evaluation/"))]
    assert len(found) == len(drawn) and {panel["xAxis"] for panel in found} == {STEP_METRIC}
    for metric, panel in zip(drawn, found, strict=True):
        if panel["metrics"]:
            assert panel["metrics"] == [metric.name] and find_metric(metric.name) is metric
        else:
            example = re.sub(r"{\w+}", "1", metric.name)
            assert panel["useMetricRegex"] and re.search(panel["metricRegex"], example)


def test_the_file_has_a_panel_for_each_metric(tmp_path):
    files = [tmp_path / name for name in ("first.json", "second.json")]
    for file in files:
        assert main(["dashboard", "chest", "--json", str(file)]) == 0
    check(json.loads(files[0].read_text()))
    assert files[0].read_text() == files[1].read_text()


@pytest.fixture
def server(tmp_path, monkeypatch):
    wandb.teardown()
    with fake_wandb() as server:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server
        end_service()
        wandb.teardown()


def test_the_server_is_sent_the_same_panels(server, capsys):
    assert main(["dashboard", "chest", "--entity", "radiology", "--name", "all runs"]) == 0
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("radiology", "chest", "all runs")
    check(json.loads(view["spec"]))
    assert "the workspace is at http" in capsys.readouterr().err


def test_a_server_that_refuses_is_an_error_with_the_remedy(server, capsys):
    server.fault = "garbage"
    assert main(["dashboard", "chest", "--entity", "radiology"]) == 2
    assert "the workspace was not written" in capsys.readouterr().err
