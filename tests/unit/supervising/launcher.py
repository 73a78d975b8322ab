"""A launcher without ranks: `python launcher.py PLAN medalign train RECIPE --run.dir DIR ...`.

PLAN is a JSON file with a list of starts, each with "status" of the launcher, the "records" of ranks, the newest "step"
in metrics.jsonl, the step of a "checkpoint", and "wait", a signal that it waits for before all that. "leave" is a
command of the shell that outlives the launcher, in a session of its own, as torchrun gives each rank. The first start
is removed from the list.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

plan = Path(sys.argv[1])
folder = Path(sys.argv[sys.argv.index("--run.dir") + 1])
start, *rest = json.loads(plan.read_text())
plan.write_text(json.dumps(rest))
if "leave" in start:
    left = subprocess.Popen(["sh", "-c", start["leave"]], cwd=folder, start_new_session=True)
    (folder / "left").write_text(str(left.pid))
if "wait" in start:
    number = signal.Signals[start["wait"]]
    signal.signal(number, lambda *_: None)
    (folder / "ready").touch()
    signal.pause()
for record in start.get("records", []):
    path = folder / "logs" / f"rank-{record['rank']}.exit.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"world": 2, "time": 0.0, "reason": ""} | record))
if "step" in start:
    rows = [json.dumps({"step": step}) + "\n" for step in range(1, start["step"] + 1)]
    (folder / "metrics.jsonl").write_text("".join(rows))
if "checkpoint" in start:
    (folder / "checkpoints" / f"step-{start['checkpoint']:06d}").mkdir(parents=True)
sys.exit(start["status"])
