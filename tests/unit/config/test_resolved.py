"""Every setting of the packaged recipes for LLaVA-Med as a literal. Building on a base changes none of them."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from medalign import config
from medalign.config.keys import flatten

WORDS = ["--student.path", "a", "--teacher.path", "b", "--data.train", "c"]

LLAVA_VQA = {
    "run.dir": "runs/default",
    "run.seed": 0,
    "data.train": "c",
    "data.validation": [],
    "data.workers": 4,
    "data.max_length": 1024,
    "data.packing": False,
    "data.max_skip_fraction": 0.01,
    "data.weights": [],
    "data.shuffle_block": 65536,
    "data.length_groups": 0,
    "data.retries": 5,
    "data.cache_dir": "",
    "data.cache_gib": 0.0,
    "teacher.path": "b",
    "teacher.mean": None,
    "teacher.std": None,
    "teacher.attention": "last_block",
    "teacher.precision": "auto",
    "teacher.compile": False,
    "teacher.text_weight": 0.0,
    "teacher.text_temperature": 0.05,
    "teacher.text_absent_weight": 0.0,
    "teacher.text_reports": False,
    "teacher.mask_sinks": 0.0,
    "teacher.cache": "",
    "teacher.similarity_weight": 1.0,
    "teacher.attention_weight": 1.0,
    "teacher.also": [],
    "teacher.lexicon": "",
    "teacher.random_weights_seed": None,
    "teacher.features": "after_norm",
    "student.path": "a",
    "student.image_size": None,
    "student.vision_tower": "",
    "student.layer": 20,
    "student.steering": True,
    "student.epsilon": 1.0,
    "student.query_mixture": False,
    "student.query_mixture_form": "beside_lora",
    "student.lora.rank": 32,
    "student.lora.alpha": 16,
    "student.lora.dropout": 0.05,
    "student.lora.rank_stabilized": False,
    "student.lora.targets": "",
    "student.train_projector": False,
    "student.attention": "auto",
    "student.gradient_checkpointing": True,
    "losses.alpha": 0.1,
    "losses.beta": 0.06,
    "losses.normalize": "sum",
    "losses.language_mean": "tokens",
    "losses.attention_rows": "prompt",
    "losses.weighting": "uniform",
    "losses.ignore_padding": False,
    "losses.impl": "auto",
    "losses.extra": [],
    "train.steps": None,
    "train.epochs": 9.0,
    "train.batch_size": 32,
    "train.micro_batch_size": 4,
    "train.lr": 0.0002,
    "train.projector_lr": 2e-05,
    "train.weight_decay": 0.0,
    "train.warmup_ratio": 0.03,
    "train.max_grad_norm": 1.0,
    "train.max_diverged_steps": 5,
    "train.max_loss_ratio": None,
    "train.rewind_on_spike": 0,
    "train.precision": "auto",
    "train.warmup_steps": None,
    "train.evaluate_every": 0,
    "train.best_metric": "loss/total",
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-08,
    "optimizer.schedule": "cosine",
    "optimizer.min_lr_ratio": 0.0,
    "checkpoint.interval": 200,
    "checkpoint.save_total_limit": 2,
    "checkpoint.keep_interval": 0,
    "checkpoint.asynchronous": True,
    "checkpoint.retry_minutes": 10.0,
    "engine.deepspeed": "zero3",
    "engine.start_timeout": 300.0,
    "engine.step_timeout": 100.0,
    "log.interval": 10,
    "log.wandb": "offline",
    "log.project": "medalign",
    "log.entity": None,
    "log.name": None,
    "log.profile_steps": 0,
}
REPORT = {"student.lora.rank": 64, "losses.alpha": 1.0, "losses.beta": 0.03, "train.epochs": 12.0}
OFFICIAL = {
    "teacher.features": "before_norm",
    "student.query_mixture_form": "official",
    "losses.normalize": "official",
    "losses.language_mean": "samples",
    "losses.attention_rows": "official",
}
RESOLVED = {
    "llava_med/vqa_rad": LLAVA_VQA,
    "llava_med/iu_xray_reports": LLAVA_VQA | REPORT,
    "official/vqa_rad": LLAVA_VQA | OFFICIAL,
    "official/iu_xray_reports": LLAVA_VQA | REPORT | OFFICIAL,
}


@pytest.mark.parametrize("name", RESOLVED)
def test_a_recipe_resolves_to_these_settings(name):
    assert flatten(asdict(config.load(name, WORDS))) == RESOLVED[name]
