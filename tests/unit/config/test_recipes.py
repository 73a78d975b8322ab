"""The packaged recipes have the settings of the released runs, which are repeated here."""

from __future__ import annotations

import functools
from dataclasses import asdict
from importlib import resources

import pytest

from medalign import config
from medalign.config.keys import flatten
from medalign.errors import ConfigError
from medalign.training.schedule import describe_length, rates, resolve_steps, total_steps

WORDS = ["--student.path", "a", "--teacher.path", "b", "--data.train", "c"]

# Settings of the released runs on LLaVA-Med-1.5, and those of each task.
PAPER = {
    "student.layer": 20,
    "student.epsilon": 1.0,
    "student.steering": True,
    "student.lora.alpha": 16,
    "student.lora.dropout": 0.05,
    "student.train_projector": False,
    "student.query_mixture": False,
    "train.lr": 2e-4,
    "train.warmup_ratio": 0.03,
    "train.weight_decay": 0.0,
    "train.precision": "auto",  # bf16 on a GPU
    "train.batch_size": 32,
    "train.steps": None,
    "data.max_length": 1024,
}
TASKS = {
    "vqa_rad": {"student.lora.rank": 32, "train.epochs": 9, "losses.alpha": 0.1, "losses.beta": 0.06},
    "iu_xray_reports": {"student.lora.rank": 64, "train.epochs": 12, "losses.alpha": 1.0, "losses.beta": 0.03},
}
FORMS = {
    "llava_med": {
        "teacher.features": "after_norm",
        "losses.normalize": "sum",
        "losses.language_mean": "tokens",
        "losses.attention_rows": "prompt",
        "student.query_mixture_form": "beside_lora",
    },
    "official": {
        "teacher.features": "before_norm",
        "losses.normalize": "official",
        "losses.language_mean": "samples",
        "losses.attention_rows": "official",
        "student.query_mixture_form": "official",
    },
}
# Data sets whose settings are not published: the recipe whose settings they have, and what differs.
UNPUBLISHED = {
    "slake": ("vqa_rad", {}),
    "pathvqa": ("vqa_rad", {}),
    "iu_xray_vqa": ("vqa_rad", {}),
    "omnimedvqa": ("vqa_rad", {"train.epochs": 1}),
    "mimic_cxr_reports": ("iu_xray_reports", {"train.epochs": 1}),
}
DATASETS = (*TASKS, *UNPUBLISHED)
# Every other recipe: the recipe that it differs from, and the settings in which it does.
CHANGES = {
    "llava_vqa": ("llava_med/vqa_rad", {}),
    "llava_report": ("llava_med/iu_xray_reports", {}),
    **{f"llava_med/{name}": (f"llava_med/{base}", change) for name, (base, change) in UNPUBLISHED.items()},
    **{f"huatuo/{name}": (f"llava_med/{name}", {"student.layer": 17}) for name in DATASETS},
    "lingshu/vqa_rad": ("llava_med/vqa_rad", {"student.layer": 17, "student.image_size": 672}),
    "qwen3_vl/vqa_rad": ("llava_med/vqa_rad", {"student.layer": 22, "student.image_size": 768}),
    "medgemma/vqa_rad": ("llava_med/vqa_rad", {"student.layer": 23}),
    "ablations/without_similarity": ("llava_med/vqa_rad", {"losses.alpha": 0.0}),
    "ablations/without_attention": ("llava_med/vqa_rad", {"losses.beta": 0.0}),
    "ablations/without_teacher": ("llava_med/vqa_rad", {"losses.alpha": 0.0, "losses.beta": 0.0}),
    "ablations/language_only": ("ablations/without_teacher", {"student.steering": False}),
    "ablations/teacher_features": (
        "ablations/language_only",
        {"student.train_projector": True, "train.projector_lr": 2e-4},
    ),
    **{f"ablations/layer_{block}": ("llava_med/vqa_rad", {"student.layer": block}) for block in (8, 16, 24, 31)},
    "ablations/teacher_unimed_b16": (
        "llava_med/vqa_rad",
        {
            "teacher.mean": (0.48145466, 0.4578275, 0.40821073),
            "teacher.std": (0.26862954, 0.26130258, 0.27577711),
        },
    ),
    "ablations/teacher_biomedclip": ("llava_med/vqa_rad", {}),
    "ablations/query_mixture": ("llava_med/vqa_rad", {"student.query_mixture": True}),
    "ablations/attention_softmax": ("llava_med/vqa_rad", {"losses.normalize": "softmax"}),
    "ablations/weighted_pairs": ("llava_med/vqa_rad", {"losses.weighting": "teacher_attention"}),
    **{f"official/{name}": (f"llava_med/{name}", FORMS["official"]) for name in TASKS},
}


@functools.cache
def loaded(name: str) -> config.Config:
    return config.load(name, WORDS)


def resolved(name: str) -> dict:
    return flatten(asdict(loaded(name)))


def test_every_packaged_recipe_is_known_here():
    assert sorted(config.recipes()) == sorted(["phantom", *(f"llava_med/{name}" for name in TASKS), *CHANGES])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_recipe_has_the_settings_of_the_released_run(form, task):
    found = resolved(f"{form}/{task}")
    wanted = PAPER | TASKS[task] | FORMS[form]
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_differs_from_its_base_only_by_these_settings(name):
    base, change = CHANGES[name]
    ours, other = resolved(base), resolved(name)
    assert {key: other[key] for key in ours if ours[key] != other[key]} == change


@pytest.mark.parametrize("name", config.recipes())
def test_every_packaged_recipe_resolves(name):
    settings = resolve_steps(loaded(name), 1797)
    assert total_steps(settings.train) > 0
    assert rates(0, settings)["adapters"] > 0


@pytest.mark.parametrize("name", ["phantom", "llava_vqa", "huatuo/omnimedvqa"])
def test_steps_on_the_command_line_replace_the_epochs_of_a_recipe(name):
    train = config.load(name, [*WORDS, "--train.steps", "3"]).train
    assert (train.steps, train.epochs) == (3, None)


@pytest.mark.parametrize("name", config.recipes())
def test_a_recipe_says_what_it_is_and_repeats_no_setting_of_another_one(name):
    """Recipes in folders are built from parts: two or three lines beside their comment."""
    text = (resources.files("medalign.config") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert 10 < len(config.summarize(name)) < 120
    if "/" in name:
        assert len([line for line in text.splitlines() if not line.startswith("#")]) <= 3


def test_the_groups_name_every_recipe_once():
    names = ", ".join(config.group_recipes())
    assert "medgemma/vqa_rad, official/{iu_xray_reports, vqa_rad}, qwen3_vl/vqa_rad" in names
    assert sorted(name.rpartition("/")[2] for name in config.recipes()) == sorted(
        word.strip("{}").rpartition("/")[2].strip("{") for word in names.split(", ")
    )


def test_a_part_is_not_a_recipe():
    with pytest.raises(ConfigError, match="parts/slake is only a part of recipes; give a whole recipe, or build one"):
        config.load("parts/slake", WORDS)


@pytest.mark.parametrize(
    ("name", "near"), [("slak", "huatuo/slake|llava_med/slake"), ("llava_med/vqa", "llava_med/vqa_rad")]
)
def test_an_unknown_recipe_names_the_nearest_one_with_its_folder(name, near):
    with pytest.raises(ConfigError, match=rf"unknown recipe '{name}': did you mean ({near})\? Packaged recipes: "):
        config.load(name, WORDS)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (0, "student.path is not set; give a local model folder with --student.path DIR"),
        (2, "teacher.path is not set; set it, or set losses.alpha 0 and losses.beta 0"),
        (4, "data.train is not set; give folders of shards with --data.train DIR"),
    ],
)
def test_a_recipe_without_a_path_is_an_error_that_names_the_setting(missing, message):
    words = WORDS[:missing] + WORDS[missing + 2 :]
    with pytest.raises(ConfigError, match=message):
        config.load("huatuo/mimic_cxr_reports", words)


def test_the_paper_s_run_on_vqa_rad_is_505_steps():
    settings = resolve_steps(loaded("llava_med/vqa_rad"), 1797)
    assert total_steps(settings.train) == 505  # 9 * 1797 / 32 is 505.4
    assert describe_length(settings, 1797) == "505 steps of 32 samples: 8.993 epochs of 1797 samples"


def test_the_quickstart_keeps_its_steps():
    assert resolve_steps(config.load("phantom", WORDS), 12345).train.steps == 600
