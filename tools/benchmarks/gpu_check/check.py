"""Checks everything that needs a GPU with one command in ten minutes: tests, kernels, training steps, tile tuning.

    tools/gpu_check.sh                    # installs missing packages into .venv, then runs this
    python -m tools.benchmarks.gpu_check --tiny      # a rehearsal on the CPU, at small sizes

Each stage is a separate process with a time limit, the most important stages first. Stages of tests run side by side,
those that measure time alone. A stage that fails or exceeds its limit does not stop the following ones; no stage starts
after the total time has passed. `--stages` runs some and keeps the rows of the others. Writes gpu_check.json,
gpu_check.md, logs/ and tables/ (the tuned tiles) into `--output`; the package's own tables are not changed. The exit
status is 0 if everything passed, 1 if something failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.benchmarks.gpu_check import page

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "tools" / "benchmarks" / "results" / "gpu_check"
# Modules that the stages import, except the package itself, which is taken from this checkout.
NEEDED = (
    "torch torchvision triton deepspeed transformers peft open_clip wandb webdataset safetensors jsonargparse yaml "
    "numpy PIL tqdm matplotlib jinja2 sacrebleu rouge_score psutil defusedxml fsspec pytest pytest_timeout hypothesis"
)
DOCUMENT = "gpu_check.json"
OLDEST = (3, 11)
PATIENCE = 4  # factor on the time limits of a rehearsal, which may share its CPU cores
TAIL = 25  # lines of the log of a failed stage

# Arguments of the kernel tests, the kernel benchmark, the step benchmark and the tuning.
Words = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]
REAL: Words = (
    (),
    ("--device", "cuda"),
    ("--preset", "llava", "--rounds", "10"),
    ("--device", "cuda", "--repeats", "5", "--seconds", "2"),
)
TINY: Words = (
    ("--rehearse", "-k", "two_runs or padded-llava-plain or llava-torch"),
    ("--device", "cpu", "--tokens", "20", "--repeats", "2"),
    ("--preset", "tiny", "--samples", "2", "--rounds", "1", "--threads", "1"),
    ("--device", "cpu", "--kernel", "attention_map", "--repeats", "1", "--seconds", "1"),
)


@dataclass(frozen=True)
class Stage:
    """One process. `figures` is the JSON file that it writes; a stage of tests writes their outcomes to a file."""

    name: str
    limit: int  # seconds
    words: tuple[str, ...]  # after the interpreter
    figures: str = ""
    tests: bool = False
    variables: dict[str, str] = field(default_factory=dict)


def missing() -> str:
    """Return what this interpreter needs to run the stages, as a sentence; empty if nothing is missing."""
    if sys.version_info < OLDEST:
        found, wanted = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST))
        return f"this is Python {found}, and {wanted} or newer is needed; set PYTHON=/path/to/python"
    names = [name for name in NEEDED.split() if importlib.util.find_spec(name) is None]
    return f"these packages are missing: {', '.join(names)}" if names else ""


def stages(tiny: bool, output: Path) -> list[Stage]:
    """Return the stages, most important first. The tuned tables are written below `output`."""
    bench = ("-m", "medalign", "bench", "kernels")
    rehearsed, measured, steps, tuned = TINY if tiny else REAL
    others = (
        "tests/gpu/test_teacher_stream.py",
        "tests/gpu/test_module_timer.py",
        "tests/gpu/test_flash_attention.py",
        "tests/gpu/test_training.py",
    )
    interpreted = {"TRITON_INTERPRET": "1"} if tiny else {}
    tables = ("--tables", str(output / "tables"))
    return [
        Stage("machine", 60, ("-m", "tools.benchmarks.gpu_check.machine")),
        _tests("token similarity", 200, ("tests/gpu/test_token_similarity.py", *rehearsed), interpreted),
        _tests("attention map", 200, ("tests/gpu/test_attention_map.py", *rehearsed), interpreted),
        _tests("training", 330, others, {}),
        Stage("kernels", 70, (*bench, *measured, "--skip", "torch.compile"), "kernels.json", variables=interpreted),
        Stage("step", 150, ("-m", "tools.benchmarks.step", *steps), "step.json"),
        Stage("tiles", 100, (*bench, "--tune", *tuned, *tables), "tiles.json", variables=interpreted),
    ]


def _tests(name: str, limit: int, words: tuple[str, ...], variables: dict[str, str]) -> Stage:
    pytest = ("-m", "pytest", "-v", "-p", "tools.benchmarks.gpu_check.outcomes", *words)
    return Stage(name, limit, pytest, tests=True, variables=variables)


def run(stage: Stage, output: Path, seconds: float, tiny: bool) -> dict[str, Any]:
    """Run a stage; returns its row with status, time, outcomes of tests and figures."""
    logs = output / "logs"
    log, outcomes, figures = (logs / f"{stage.name.replace(' ', '_')}{end}" for end in (".txt", ".jsonl", ".json"))
    for stale in (log, outcomes, figures):
        stale.unlink(missing_ok=True)
    words = [*stage.words, *(("--output", str(figures)) if stage.figures else ())]
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as text:
        status = _within(seconds, [sys.executable, *words], text, _variables(stage, outcomes, tiny))
    row: dict[str, Any] = {"stage": stage.name, "status": status, "seconds": round(time.monotonic() - began, 1)}
    row["command"] = shlex.join(["python", *(word.replace(str(output), "OUTPUT") for word in stage.words)])
    lines = (
        log.read_text(encoding="utf-8", errors="replace").replace(f"{ROOT}/", "").replace(str(ROOT), ".").splitlines()
    )
    if stage.tests:
        row["tests"] = [json.loads(line) for line in outcomes.read_text().splitlines()] if outcomes.exists() else []
        if status == "ok" and not any(test["outcome"] == "passed" for test in row["tests"]) and not tiny:
            row["status"] = "failed: every test was skipped"
    elif stage.figures and figures.exists():
        row["figures"] = json.loads(figures.read_text())
    elif status == "ok":
        row["figures"] = json.loads(lines[-1])
    if row["status"] != "ok":
        row["tail"] = lines[-TAIL:]
    return row


def _variables(stage: Stage, outcomes: Path, tiny: bool) -> dict[str, str]:
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(places), "TRITON_INTERPRET": "0"}
    ours |= {"GPU_CHECK_OUTCOMES": str(outcomes), "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}
    if tiny:
        ours |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return os.environ | ours | stage.variables


def _within(seconds: float, command: list[str], log: Any, variables: dict[str, str]) -> str:
    """Run a command in a new process group, and kill the whole group when the time is over."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"out of time: killed after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if code == 0 else f"failed: status {code}"


def check(output: Path, minutes: float, tiny: bool, names: Collection[str] = ()) -> dict[str, Any]:
    """Run the stages while there is time; with `names`, only those and the description of the machine."""
    began, deadline = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.monotonic() + 60 * minutes
    machine, *others = stages(tiny, output)
    first = _run_before(deadline, machine, output, tiny)
    if not tiny:
        _require_card(first)
    selected = [stage for stage in others if not names or stage.name in names]
    tests, measured = ([stage for stage in selected if stage.tests is kind] for kind in (True, False))
    with ThreadPoolExecutor(1 if tiny else max(1, len(tests))) as pool:  # a rehearsal has few cores
        rows = list(pool.map(lambda stage: _run_before(deadline, stage, output, tiny), tests))
    rows += [_run_before(deadline, stage, output, tiny) for stage in measured]
    kept = {row["stage"]: row for row in _earlier(output)} if names else {}
    kept |= {row["stage"]: row for row in rows}
    rows = [kept[stage.name] for stage in others if stage.name in kept]
    return {
        "began": began,
        "seconds": round(sum(row["seconds"] for row in [first, *rows]), 1),
        "rehearsal": tiny,
        "machine": first.get("figures", {}),
        "stages": rows,
        "failed": [row["stage"] for row in [first, *rows] if row["status"] != "ok"],
    }


def _run_before(deadline: float, stage: Stage, output: Path, tiny: bool) -> dict[str, Any]:
    """Run a stage and print its outcome, unless the time is over."""
    left = deadline - time.monotonic()
    if left < 5:
        row: dict[str, Any] = {"stage": stage.name, "status": "not run: no time left", "seconds": 0.0}
    else:
        row = run(stage, output, min(stage.limit * (PATIENCE if tiny else 1), left), tiny)
    print(f"{stage.name}: {_line(row)}", flush=True)
    return row


def _earlier(output: Path) -> list[dict[str, Any]]:
    """Return the rows of the check before this one in the same folder."""
    document = output / DOCUMENT
    return json.loads(document.read_text())["stages"] if document.exists() else []


def _require_card(row: dict[str, Any]) -> None:
    """Exit with status 2 if there is no GPU, without which no other stage can run."""
    if row.get("figures", {}).get("card"):
        return
    print("\n".join(row.get("tail", [])))
    print("no CUDA device found (is the driver loaded? nvidia-smi -L); --tiny rehearses on the CPU")
    raise SystemExit(2)


def _line(row: dict[str, Any]) -> str:
    counted = Counter(test["outcome"] for test in row.get("tests", []))
    tests = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counted.items()))
    return f"{row['status']} ({row['seconds']:.0f} s{', tests: ' + tests if tests else ''})"


def main() -> int:
    """Run the check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help=f"default {RESULTS.relative_to(ROOT)}"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages together (default %(default)s)")
    known = [stage.name for stage in stages(tiny=True, output=RESULTS)[1:]]
    parser.add_argument("--stages", nargs="+", default=(), choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU, at small sizes")
    parser.add_argument("--missing", action="store_true", help="only list missing packages; status 1 if there are any")
    options = parser.parse_args()
    lacking = missing()
    if lacking:
        print(f"{sys.executable}: {lacking}", file=sys.stderr)
    if lacking or options.missing:
        return int(bool(lacking))
    output = options.output.resolve()
    if not options.stages:
        shutil.rmtree(output / "tables", ignore_errors=True)
    (output / "logs").mkdir(parents=True, exist_ok=True)
    document = check(output, options.minutes, options.tiny, options.stages)
    (output / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (output / "gpu_check.md").write_text(page.render(document), encoding="utf-8")
    for line in page.failures(document):
        print(f"FAILED {line}")
    print(f"{'something failed' if document['failed'] else 'everything passed'}: {output / 'gpu_check.md'}")
    return int(bool(document["failed"]))
