"""The check's JSON as a page of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

NOTES = """\
Tests hold each kernel against the specification in float64, within limits that `tests/gpu/tolerances.py` derives. A run
that was killed goes on to the bit with eager attention; SDPA and flash-attention sum parts of their gradients in any
order. What needs several cards is not covered here: NCCL between ranks, ZeRO's partitions. `torch.compile` is left out
of the kernels' benchmark, for the time that it takes to compile.
"""
FORMS = {
    "plain": "plain fine-tuning",
    "medalign_given": "both losses, targets given",
    "medalign_online": "both losses, teacher on line",
    "released_given": "the released code's form, targets given",
    "released_online": "the released code's form, teacher on line",
}


def render(document: dict[str, Any]) -> str:
    """The whole page."""
    parts = ["# GPU check", *_head(document), "## Stages", _stages(document)]
    failed = list(failures(document))
    if failed:
        parts += ["## What failed", "\n".join(f"- {line}" for line in failed), *_tails(document)]
    for row in document["stages"]:
        figures = row.get("figures")
        if figures and row["stage"] == "step":
            parts += ["## Whole steps", *_steps(figures)]
        elif figures:
            title = {"kernels": "## Kernels", "tiles": "## Tiles, after a short search"}[row["stage"]]
            parts += [title, *(f"{name}\n\n{table(rows)}" for name, rows in figures.items())]
    skipped = list(_skipped(document))
    if skipped:
        parts += ["## Tests that were skipped", "\n".join(f"- {line}" for line in skipped)]
    return "\n\n".join([*parts, "## Notes", NOTES.strip()]) + "\n"


def failures(document: dict[str, Any]) -> Iterator[str]:
    """One line per failed test, and per stage that failed without one."""
    if not document["machine"]:
        yield "machine: nothing could be said about it"
    for row in document["stages"]:
        bad = [test for test in row.get("tests", []) if test["outcome"] == "failed"]
        for test in bad:
            yield f"{row['stage']}: `{test['test']}`: {test['reason']}"
        if row["status"] != "ok" and not (bad and row["status"].startswith("failed")):
            yield f"{row['stage']}: {row['status']}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The keys of the first row are the head."""
    if not rows:
        return "nothing"
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_cell(row.get(name)) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "not known"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def _head(document: dict[str, Any]) -> Iterator[str]:
    if document["rehearsal"]:
        yield "**A rehearsal on the CPU, at small sizes: nothing here says anything about a GPU.**"
    machine = [{"": name, "value": value} for name, value in document["machine"].items()]
    yield table(machine)
    verdict = f"failed: {', '.join(document['failed'])}" if document["failed"] else "all went well"
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
