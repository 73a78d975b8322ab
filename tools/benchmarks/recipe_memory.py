"""What each recipe needs in memory per GPU, derived from shapes: the table in docs/recipes.md.

    python -m tools.benchmarks.recipe_memory

Plans every packaged recipe as `medalign plan` does, on 1 and on 8 GPUs, with the configurations in tools/model_configs.
Recipes that need the same memory share a row. Writes results/recipe_memory.json and the table of the page.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medalign import config
from medalign.config import Config, StudentConfig
from medalign.config.keys import flatten
from medalign.planning.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "tools" / "model_configs"
RESULTS = ROOT / "tools" / "benchmarks" / "results" / "recipe_memory.json"
PAGE = ROOT / "docs" / "recipes.md"
GPUS = (1, 8)
RECIPES = tuple(name for name in config.recipes() if name != "phantom")
STUDENTS = ("llava_med", "huatuo", "lingshu", "qwen3_vl", "medgemma")  # folders of recipes and of configurations
TEACHERS = {"ablations/teacher_unimed_b16": "unimed_b16", "ablations/teacher_biomedclip": "biomedclip"}
_STATE = ("weights", "gathered", "gradients", "buckets", "optimizer", "teacher")
_GIB = 2**30

Row = Mapping[str, Any]


def student_name(recipe: str) -> str:
    """Return the folder in tools/model_configs of a recipe's student."""
    folder = recipe.partition("/")[0]
    return folder if folder in STUDENTS else "llava_med"


def teacher_name(recipe: str) -> str:
    """Return the folder in tools/model_configs of a recipe's teacher."""
    return TEACHERS.get(recipe, "unimed_l14")


@functools.cache
def load(recipe: str, *overrides: str) -> Config:
    """Read a recipe with the configurations of its models and without data."""
    words = [
        "--student.path",
        str(CONFIGS / student_name(recipe)),
        "--teacher.path",
        str(CONFIGS / teacher_name(recipe)),
    ]
    return config.load(recipe, [*words, *overrides], data=False)


def settings(recipe: str) -> dict[str, Any]:
    """Return the settings that a recipe's memory depends on; those of the student where they are not the default."""
    found = load(recipe)
    usual = flatten(asdict(StudentConfig()))
    student = {name: value for name, value in flatten(asdict(found.student)).items() if value != usual[name]}
    for free in ("path", "layer"):  # all blocks have the same size
        student.pop(free, None)
    if not found.student.query_mixture:
        student.pop("query_mixture_form", None)
    return {
        "student": {"name": student_name(recipe), **student},
        "teacher": teacher_name(recipe) if found.distils else None,
        "micro_batch_size": found.train.micro_batch_size,
        "batch_size": found.train.batch_size,
        "max_length": found.data.max_length,
        "deepspeed": found.engine.deepspeed,
    }


def group() -> list[tuple[dict[str, Any], list[str]]]:
    """Group the recipes by the settings that their memory depends on, those of a student's folder first."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for recipe in sorted(RECIPES, key=_order):
        wanted = settings(recipe)
        names = next((names for known, names in found if known == wanted), None)
        if names is None:
            found.append((wanted, [recipe]))
        else:
            names.append(recipe)
    return found


def _order(recipe: str) -> tuple[int, str]:
    folder = recipe.partition("/")[0]
    return (STUDENTS.index(folder) if folder in STUDENTS else len(STUDENTS), recipe)


def measure(recipe: str, gpus: int) -> dict[str, int]:
    """Plan a recipe on one node; return its parameters and the bytes per GPU by kind."""
    plan = make_plan(load(recipe), nodes=1, gpus=gpus)
    sample = plan.sample["checkpointed" if plan.checkpointing else "stored"]
    student = sum(count for name, count in plan.parameters.items() if name != "teacher")
    return {
        "gpus": gpus,
        "parameters": student,
        "trained": sum(plan.trainable.values()),
        **{name: getattr(plan.state, name) for name in _STATE},
        "activations": plan.micro_batch * sample.activations,
        "rest": plan.micro_batch * (sample.total - sample.activations),
        "total": plan.memory,
    }


def table(rows: Sequence[Row]) -> str:
    """Format the rows for the page, in GiB."""
    kinds = (*_STATE, "activations", "rest", "total")
    lines = [["recipes", "GPUs", "parameters", "trained", *kinds]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        for found in row["plans"]:
            counts = (f"{found['parameters'] / 1e9:.2f} B", f"{found['trained'] / 1e6:.1f} M")
            names = ", ".join(f"`{name}`" for name in _fold(row["recipes"])) if found["gpus"] == GPUS[0] else ""
            lines.append([names, str(found["gpus"]), *counts, *(f"{found[kind] / _GIB:.2f}" for kind in kinds)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fold(recipes: Sequence[str]) -> Iterator[str]:
    """Write the recipes of a folder together."""
    folders = dict.fromkeys(name.rpartition("/")[0] for name in recipes)
    for folder in folders:
        names = [name.rpartition("/")[2] for name in recipes if name.rpartition("/")[0] == folder]
        if folder and len(names) > 1:
            yield f"{folder}/{{{', '.join(names)}}}"
        else:
            yield from (f"{folder}/{name}" if folder else name for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the results and the page's table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    rows = []
    for wanted, names in group():
        rows.append({"recipes": names, "settings": wanted, "plans": [measure(names[0], gpus) for gpus in GPUS]})
        sys.stderr.write(f"{names[0]}\n")
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    pattern = r"\| recipes \| GPUs \|(?:.*\n)(?:\|.*\n)+"
    PAGE.write_text(re.sub(pattern, lambda _: table(rows) + "\n", text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
