"""A small W&B server on 127.0.0.1: the calls that wandb makes for a run, and ways to fail.

It keeps what a client sends, so that a test can compare the history of a run, look for what must stay private, or let
the server answer wrongly. It is enough for wandb 0.31: GraphQL (the user, the state of a run that resumes, the run's
settings, its files, alerts, workspaces), the stream of files with the history, and uploads.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["", "error", "garbage", "slow", "refused"]
HISTORY = "wandb-history.jsonl"


@dataclass
class FakeRun:
    """What the server has of a run.

    Attributes:
        inputs: the newest value of each input of the run: names, group, tags, settings.
        files: lines of each streamed file, by name and position.
        uploads: contents of the uploaded files.
        exit_code: how the run ended; None while it has not.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[int, str]] = field(default_factory=dict)
    uploads: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the history, in order."""
        lines = self.files.get(HISTORY, {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings, without W&B's own."""
        sent = json.loads(self.inputs.get("config") or "{}")
        return {name: entry["value"] for name, entry in sent.items() if name != "_wandb"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients that give up are expected."""


class FakeWandb:
    """A server with its state.

    Attributes:
        url: its address.
        fault: how it answers: rightly, with status 500, with text that is not JSON, after a minute, or by closing the
            connection.
        runs: by id.
        alerts: what was sent, in order.
        views: workspaces that were saved.
        requests: every path with its body.
    """

    def __init__(self) -> None:
        self.fault: Fault = ""
        self.runs: dict[str, FakeRun] = {}
        self.alerts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.requests: list[tuple[str, bytes]] = []
        self.closed = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of all runs."""
        return [row for run in self.runs.values() for row in run.history]

    def close(self) -> None:
        """Stop to listen, as a server that vanishes."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def wait(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait until the server has what a test expects."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"the server has only {[path for path, _ in self.requests]}"
            time.sleep(0.02)

    def answer(self, path: str, body: bytes) -> Any:
        """Take a request and return the answer, for JSON."""
        self.requests.append((path, body))
        if path == "/graphql":
            call = json.loads(body)
            return {"data": self._graphql(call["query"], call.get("variables") or {})}
        parts = path.strip("/").split("/")
        if parts[0] == "files" and parts[-1] == "file_stream":
            self._stream(self.runs.setdefault(parts[-2], FakeRun()), json.loads(body))
        elif parts[0] == "upload":
            self.runs.setdefault(parts[1], FakeRun()).uploads["/".join(parts[2:])] = body.decode(errors="replace")
        return {}

    def _graphql(self, query: str, values: dict[str, Any]) -> dict[str, Any]:
        owner = {"id": "o", "name": "tester"}
        project = {"id": "p", "name": values.get("project") or "medalign", "entity": owner}
        if "RunResumeStatus" in query:
            return {
                "model": project | {"bucket": self._bucket(values["name"]) if values["name"] in self.runs else None}
            }
        if "upsertBucket" in query:
            run = self.runs.setdefault(values["name"], FakeRun())
            run.inputs |= {name: value for name, value in values.items() if value is not None}
            return {"upsertBucket": {"bucket": self._bucket(values["name"]) | {"project": project}, "inserted": True}}
        if "createRunFiles" in query:
            names = [
                {"name": name, "uploadUrl": f"{self.url}/upload/{values['run']}/{name}"} for name in values["files"]
            ]
            return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": names}}
        if "notifyScriptableRunAlert" in query:
            self.alerts.append(values)
            return {"notifyScriptableRunAlert": {"success": True}}
        if "upsertView" in query:
            self.views.append(values)
            return {"upsertView": {"view": {"id": "v", "name": values["name"]}, "inserted": True}}
        return {"viewer": {"id": "u", "username": "tester", "entity": "tester", "flags": "{}", "teams": {"edges": []}}}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        counts = {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "tags": [], "notes": None}
        return counts | {
            "id": name,
            "name": name,
            "displayName": run.inputs.get("displayName"),
            "config": run.inputs.get("config"),
            "summaryMetrics": run.files.get("wandb-summary.json", {}).get(0, "{}"),
            "historyLineCount": len(run.history),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "wandbConfig": json.dumps({"t": 1}),  # without a time of start the client would not resume
        }

    def _stream(self, run: FakeRun, message: dict[str, Any]) -> None:
        for name, part in (message.get("files") or {}).items():
            run.files.setdefault(name, {}).update(enumerate(part["content"], start=part["offset"]))
        run.preempting |= bool(message.get("preempting"))
        if message.get("complete"):
            run.exit_code = message["exitcode"]


def _handler(server: FakeWandb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if server.fault == "slow":
                server.closed.wait(60)
            if server.fault == "refused":
                self.close_connection = True
            elif server.fault in ("error", "garbage"):
                self._send(500 if server.fault == "error" else 200, b"<html>out of order</html>")
            else:
                self._send(200, json.dumps(server.answer(self.path, body)).encode())

        do_GET = do_POST = do_PUT = _serve  # noqa: N815 (names of the library)

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    return Handler


@contextmanager
def fake_wandb() -> Iterator[FakeWandb]:
    """Run a server inside the context."""
    server = FakeWandb()
    try:
        yield server
    finally:
        if not server.closed.is_set():
            server.close()
