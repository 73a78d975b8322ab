"""The page of the recipes: its tables agree with the recipes and with the planner."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from medalign import config
from tools.benchmarks import recipe_memory as tool

PUBLISHED = {
    "llava_med": "llava-med-1.5",
    "huatuo": "huatuogpt-vision-7b",
    "lingshu": "qwen2.5-vl-7b",
    "qwen3_vl": "qwen3-vl-8b",
    "medgemma": "medgemma-4b",
}
ROWS: list[dict[str, Any]] = json.loads(tool.RESULTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page() -> str:
    return tool.PAGE.read_text(encoding="utf-8")


def test_the_memory_is_that_of_the_present_recipes():
    assert [(row["settings"], row["recipes"]) for row in ROWS] == tool.group(), "run tools.benchmarks.recipe_memory"
    assert sorted(name for row in ROWS for name in row["recipes"]) == sorted(tool.RECIPES)


def test_a_plan_made_again_is_the_same():
    recipe = "llava_med/vqa_rad"
    (row,) = (row for row in ROWS if recipe in row["recipes"])
    (found,) = (plan for plan in row["plans"] if plan["gpus"] == 8)
    assert tool.measure(recipe, 8) == found, "run tools.benchmarks.recipe_memory"


def test_the_kinds_add_up_and_the_page_has_the_table(page):
    for row in ROWS:
        assert [plan["gpus"] for plan in row["plans"]] == [1, 8]
        for plan in row["plans"]:
            kinds = ("weights", "gathered", "gradients", "buckets", "optimizer", "teacher", "activations", "rest")
            assert sum(plan[kind] for kind in kinds) == plan["total"]
    assert tool.table(ROWS) in page


def new_parameters(row: dict[str, Any]) -> int:
    """The trained parameters of a row's first plan that the published model does not have."""
    student, trained = row["settings"]["student"], row["plans"][0]["trained"]
    if not student.get("train_projector"):
        return trained
    model = json.loads((tool.CONFIGS / student["name"] / "config.json").read_text())
    seen, width = model["vision_config"]["hidden_size"], model["text_config"]["hidden_size"]
    return trained - (seen + 1) * width - (width + 1) * width  # the two layers of LLaVA's projector


def test_the_students_have_the_published_number_of_parameters(shared: Path):
    for row in ROWS:
        name = row["settings"]["student"]["name"]
        known = json.loads((shared / "models" / f"student-{PUBLISHED[name]}.json").read_text())
        plan = row["plans"][0]
        assert plan["parameters"] - new_parameters(row) == known["parameters_total"]


def test_the_table_of_the_data_sets_has_the_settings_of_the_recipes(page):
    rows = re.findall(
        r"^\| .* \| (`llava_med.*`) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| .* \|$", page, re.MULTILINE
    )
    named = [name for row in rows for name in re.findall(r"`(.+?)`", row[0])]
    assert sorted(named) == sorted(name for name in tool.RECIPES if name.startswith(("llava_med/", "huatuo/")))
    for names, epochs, rank, alpha, beta in rows:
        for name in re.findall(r"`(.+?)`", names):
            found = tool.load(name)
            assert (found.train.epochs, found.student.lora.rank) == (float(epochs), int(rank))
            assert (found.losses.alpha, found.losses.beta) == (float(alpha), float(beta))


def test_the_page_names_every_recipe(page):
    for name in config.recipes():
        assert name == "phantom" or f"`{name}`" in page, name


def test_an_epoch_of_vqa_rad_has_56_steps(page):
    batch = tool.load("llava_med/vqa_rad").train.batch_size
    assert f"An epoch of VQA-RAD is {1797 // batch} such steps" in " ".join(page.split())


def test_the_teachers_have_the_published_configuration(shared: Path):
    known = json.loads((shared / "models" / "teacher-unimed-clip.json").read_text())["files"]
    files = {name.split(" ")[0]: values["config"] for name, values in known.items() if isinstance(values, dict)}
    for folder, file in (
        ("unimed_l14", "unimed_clip_vit_l14_base_text_encoder.pt"),
        ("unimed_b16", "unimed_clip_vit_b16.pt"),
    ):
        model = json.loads((tool.CONFIGS / folder / "open_clip_config.json").read_text())["model_cfg"]
        embedding = {name: model[name] for name in ("embed_dim", "quick_gelu")}
        assert model["vision_cfg"] | embedding == files[file]
    biomedclip = json.loads((shared / "models" / "teacher-biomedclip.json").read_text())["config"]
    found = json.loads((tool.CONFIGS / "biomedclip" / "open_clip_config.json").read_text())
    assert found["model_cfg"]["vision_cfg"] == biomedclip["model_cfg"]["vision_cfg"]
    assert found["preprocess_cfg"] == biomedclip["preprocess_cfg"]
