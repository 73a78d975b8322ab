"""The packaged recipes have the settings of the released runs, which are repeated here."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from medalign import config
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
    "vqa": {"student.lora.rank": 32, "train.epochs": 9, "losses.alpha": 0.1, "losses.beta": 0.06},
    "report": {"student.lora.rank": 64, "train.epochs": 12, "losses.alpha": 1.0, "losses.beta": 0.03},
}
FORMS = {
    "llava": {
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

OTHERS = {  # recipes of other students: what differs from llava_vqa
    "lingshu_vqa": {"student.layer": 17, "student.image_size": 672},
    "qwen3vl_vqa": {"student.layer": 22, "student.image_size": 768},
    "medgemma_vqa": {"student.layer": 23},
}


def flat(values: dict, prefix: str = "") -> dict:
    pairs = {}
    for name, value in values.items():
        pairs |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return pairs


def test_every_packaged_recipe_is_known_here():
    assert config.recipes() == sorted(["phantom", *OTHERS, *(f"{form}_{task}" for form in FORMS for task in TASKS)])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_recipe_has_the_settings_of_the_released_run(form, task):
    found = flat(asdict(config.load(f"{form}_{task}", WORDS)))
    wanted = PAPER | TASKS[task] | FORMS[form]
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("task", TASKS)
def test_an_official_recipe_differs_from_ours_only_by_its_form(task):
    ours, official = (flat(asdict(config.load(f"{form}_{task}", WORDS))) for form in FORMS)
    assert {name for name in ours if ours[name] != official[name]} == set(FORMS["official"])


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_of_another_student_differs_only_by_it(name):
    ours, other = (flat(asdict(config.load(recipe, WORDS))) for recipe in ("llava_vqa", name))
    assert {key: other[key] for key in ours if ours[key] != other[key]} == OTHERS[name]


@pytest.mark.parametrize("name", config.recipes())
def test_every_packaged_recipe_resolves(name):
    settings = resolve_steps(config.load(name, WORDS), 1797)
    assert total_steps(settings.train) > 0
    assert rates(0, settings)["adapters"] > 0
    assert config.load(name, [*WORDS, "--train.steps", "3"]).train.epochs is None


def test_the_paper_s_run_on_vqa_rad_is_505_steps():
    settings = resolve_steps(config.load("llava_vqa", WORDS), 1797)
    assert total_steps(settings.train) == 505  # 9 * 1797 / 32 is 505.4
    assert describe_length(settings, 1797) == "505 steps of 32 samples: 8.993 epochs of 1797 samples"


def test_the_quickstart_keeps_its_steps():
    assert resolve_steps(config.load("phantom", WORDS), 12345).train.steps == 600
