"""Formats the results of the check as a page of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

NOTES = """\
Tests compare each kernel with the reference in float64, within limits that `tests/gpu/tolerances.py` derives. With
eager attention, a run that was killed resumes bit-identically; SDPA and flash-attention sum parts of their gradients in
varying order. What needs several GPUs (NCCL between ranks, ZeRO partitions) is not covered. The kernel benchmark skips
`torch.compile`, which takes too long to compile.
"""
FORMS = {
    "plain": "plain fine-tuning",
    "medalign_given": "both losses, precomputed targets",
    "medalign_online": "both losses, teacher online",
    "released_given": "released code, precomputed targets",
    "released_online": "released code, teacher online",
}


def render(document: dict[str, Any]) -> str:
    """Format the whole page."""
    parts = ["# GPU check", *_head(document), "## Stages", _stages(document)]
    failed = list(failures(document))
    if failed:
        parts += ["## Failures", "\n".join(f"- {line}" for line in failed), *_tails(document)]
    for row in document["stages"]:
        figures = row.get("figures")
        if figures and row["stage"] == "step":
            parts += ["## Training steps", *_steps(figures)]
        elif figures:
            title = {"kernels": "## Kernels", "tiles": "## Tiles, after a short tuning"}[row["stage"]]
            parts += [title, *(f"{name}\n\n{table(rows)}" for name, rows in figures.items())]
    skipped = list(_skipped(document))
    if skipped:
        parts += ["## Skipped tests", "\n".join(f"- {line}" for line in skipped)]
    return "\n\n".join([*parts, "## Notes", NOTES.strip()]) + "\n"


def failures(document: dict[str, Any]) -> Iterator[str]:
    """One line per failed test, and per stage that failed without one."""
    if not document["machine"]:
        yield "machine: it could not be described"
    for row in document["stages"]:
        bad = [test for test in row.get("tests", []) if test["outcome"] == "failed"]
        for test in bad:
            yield f"{row['stage']}: `{test['test']}`: {test['reason']}"
        if row["status"] != "ok" and not (bad and row["status"].startswith("failed")):
            yield f"{row['stage']}: {row['status']}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows with all their keys as header."""
    if not rows:
        return "no rows"
    head = list(dict.fromkeys(name for row in rows for name in row))
    lines = [head, ["---"] * len(head), *([_cell(row.get(name, "")) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def _head(document: dict[str, Any]) -> Iterator[str]:
    if document["rehearsal"]:
        yield "**A rehearsal on the CPU at small sizes: these figures do not describe a GPU.**"
    machine = [{"": name, "value": value} for name, value in document["machine"].items()]
    yield table(machine)
    verdict = f"failed: {', '.join(document['failed'])}" if document["failed"] else "everything passed"
    yield f"{document['began']}, {document['seconds']:.0f} s: **{verdict}**."


def _stages(document: dict[str, Any]) -> str:
    rows = []
    for row in document["stages"]:
        counted = Counter(test["outcome"] for test in row.get("tests", []))
        tests = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counted.items()))
        command = f"`{row['command']}`" if "command" in row else ""
        rows.append(
            {"stage": row["stage"], "status": row["status"], "s": row["seconds"], "tests": tests, "command": command}
        )
    return table(rows)


def _tails(document: dict[str, Any]) -> Iterator[str]:
    for row in document["stages"]:
        if row.get("tail"):
            yield f"The end of the log of {row['stage']}:\n\n```\n" + "\n".join(row["tail"]) + "\n```"


def _steps(figures: dict[str, Any]) -> Iterator[str]:
    for found in (value for value in figures.values() if isinstance(value, dict)):
        facts = {name: value for name, value in found.items() if not isinstance(value, dict) and "_to_" not in name}
        yield table([{"form": FORMS[name]} | _step(row) for name, row in found["forms"].items()])
        yield table([{"ratio of times": name, "": value} for name, value in found.items() if "_to_" in name])
        plan = {f"plan: {name}": value for name, value in found.get("plan", {}).items()}
        yield table([{"setting": name, "value": value} for name, value in (facts | plan).items()])


def _step(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("out_of_memory"):
        return dict.fromkeys(("s", "p20", "p80", "peak GiB", "MFU"), "out of memory")
    names = {"s": "seconds", "p20": "p20", "p80": "p80", "peak GiB": "peak_gib", "MFU": "mfu"}
    return {title: row[name] for title, name in names.items()}


def _skipped(document: dict[str, Any]) -> Iterator[str]:
    tests = [test for row in document["stages"] for test in row.get("tests", []) if test["outcome"] == "skipped"]
    for reason, number in Counter(test["reason"] for test in tests).items():
        yield f"{number}: {reason}"
