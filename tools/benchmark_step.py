"""What distillation costs: whole training steps, side by side in one process, one rank under ZeRO-3.

    python tools/benchmark_step.py                     # the packaged student, and a wider one with 576 image tokens
    python tools/benchmark_step.py --preset phantom --rounds 5

Three ways to take the same step, in turn, so that the machine's moods hit all alike:

    plain     language loss alone, SDPA, no teacher
    medalign  both losses, teacher on line, SDPA, the tapped rows alone
    eager     the same losses in the released code's form: eager attention with the weights of every block kept,
              N x N similarity matrices in autograd

Then `medalign` on micro-batches of phantoms, questions and reports mixed, padded and packed (data.packing).

Writes medians, their ratios, and the command to tools/results/step_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from medalign import distributed
from medalign.config import Config, load
from medalign.contracts import IGNORE, Batch, StudentOutput
from medalign.data import phantom
from medalign.data.index import ShardIndex
from medalign.data.plan import GlobalOrder
from medalign.engine import engine as door
from medalign.engine.engine import Engine
from medalign.engine.settings import deepspeed_settings
from medalign.geometry import gather_images
from medalign.run import build_collator, build_objective, build_teacher, parameter_groups
from medalign.student.loading import load_processor, load_student
from medalign.student.model import Student
from medalign.student.packing import layout
from medalign.training.schedule import peaks
from medalign.training.step import Step

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "medalign" / "assets"
VARIANTS = ("plain", "medalign", "eager")


class EagerStudent(Student):
    """The released code's form: every block's attention weights are made and kept, and the map is cut out of one."""

    def forward(self, batch: Batch, *, tap: bool = True) -> StudentOutput:
        kept = (batch.labels[:, 1:] != IGNORE).any(0).nonzero()[:, 0]
        self._begin(batch)
        output = self.model(
            input_ids=batch.input_ids,
            pixel_values=batch.student_pixels.to(self.dtype),
            logits_to_keep=kept,
            output_attentions=True,
            use_cache=False,
            **layout(batch),
        )
        weights_BLL = output.attentions[self.layer].mean(1)
        rows_BL1 = batch.question_mask[..., None].float()
        map_BL = (weights_BLL * rows_BL1).sum(1) / rows_BL1.sum(1).clamp(min=1)
        images, tokens = len(batch.image_weight), self.anatomy.grid.size
        assert self._tokens is not None
        return StudentOutput(
            logits=output.logits,
            kept=kept,
            tokens=gather_images(self._tokens, batch.image_index, images, tokens),
            attention=gather_images(map_BL, batch.image_index, images, tokens),
        )


def settings(variant: str, student: Path, batch: int) -> Config:
    words = ["--data.train", "none", "--student.path", str(student), "--train.batch_size", str(batch)]
    words += ["--train.micro_batch_size", str(batch)]
    if variant == "plain":
        words += ["--losses.alpha", "0", "--losses.beta", "0", "--student.steering", "false"]
    if variant == "eager":
        words += ["--student.attention", "eager", "--losses.impl", "reference"]
    return load("phantom", words)


def wide_student(folder: Path) -> Path:
    """Random weights at LLaVA's geometry, 336 pixels in patches of 14, with a decoder of width 512 and 6 blocks."""
    config = AutoConfig.from_pretrained(ASSETS / "phantom_student")
    config.vision_config.image_size, config.vision_config.patch_size = 336, 14
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1408, 6
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 8, 2, 64
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(ASSETS / "phantom_student").save_pretrained(folder)
    return folder


def make_batch(student: Student, teacher_size: int, samples: int, question: int = 24, answer: int = 16) -> Batch:
    """Random pixels and tokens: one image a sample, then a question and an answer."""
    grid, anatomy = student.anatomy.grid.size, student.anatomy
    length = 1 + grid + question + answer
    ids = torch.randint(10, 1000, (samples, length))
    ids[:, 1 : 1 + grid] = anatomy.image_token_id
    index = torch.full((samples, length), -1)
    index[:, 1 : 1 + grid] = torch.arange(samples)[:, None]
    asked = torch.zeros(samples, length, dtype=torch.bool)
    asked[:, 1 + grid : 1 + grid + question] = True
    labels = ids.clone()
    labels[:, : 1 + grid + question] = IGNORE
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones(samples, length, dtype=torch.bool),
        labels=labels,
        question_mask=asked,
        image_index=index,
        student_pixels=torch.randn(samples, 3, anatomy.image_size, anatomy.image_size),
        teacher_pixels=torch.randn(samples, 3, teacher_size, teacher_size),
        image_weight=torch.ones(samples),
        patch_valid=torch.ones(samples, grid, dtype=torch.bool),
        image_sample=torch.arange(samples),
        keys=tuple(map(str, range(samples))),
    )


def build(variant: str, folder: Path, samples: int) -> tuple[Step, dict[str, float]]:
    config = settings(variant, folder, samples)
    ds_settings = deepspeed_settings(config, 1)
    teacher = build_teacher(config)
    with door.sharded_loading(ds_settings):
        student = load_student(config.student, torch.float32)
    if variant == "eager":
        student.__class__ = EagerStudent
    student.train()
    engine = Engine(student, parameter_groups(student, config), ds_settings)
    return Step(engine, teacher, build_objective(config), student.anatomy.grid), peaks(config.train)


def measure(preset: str, samples: int, rounds: int, folder: Path) -> dict:
    steps = {variant: build(variant, folder, samples) for variant in VARIANTS}
    step, _ = steps["medalign"]
    assert step.teacher is not None and isinstance(step.engine.student, Student)
    batch = make_batch(step.engine.student, step.teacher.image_size, samples)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    losses: dict[str, float] = {}
    for turn in tqdm(range(rounds + 2), desc=preset):
        for variant, (take, rates) in steps.items():
            began = time.perf_counter()
            result = take([batch], rates)
            if turn == 0:
                losses[variant] = result["loss/total"]
            elif turn > 1:  # ZeRO-3 records the order of the weights in the first two
                times[variant].append(time.perf_counter() - began)
    assert abs(losses["medalign"] - losses["eager"]) < 1e-3 * abs(losses["eager"]), "the two forms must agree"
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    return {
        "image_tokens": step.grid.size,
        "samples": samples,
        "rounds": rounds,
        "seconds": {variant: round(value, 4) for variant, value in medians.items()},
        "medalign_to_plain": round(medians["medalign"] / medians["plain"], 3),
        "eager_to_medalign": round(medians["eager"] / medians["medalign"], 3),
        "first_loss": losses,
    }


def measure_packing(samples: int, rounds: int, folder: Path) -> dict:
    """The same micro-batches with padding and without, on the packaged student."""
    phantom.write(folder, 80, 1, 0)
    index = ShardIndex.open(folder / "train")
    step, rates = build("medalign", ASSETS / "phantom_student", samples)
    config = settings("medalign", ASSETS / "phantom_student", samples)
    assert isinstance(step.engine.student, Student)
    collate = build_collator(config, step.engine.student, load_processor(config.student), step.teacher, 1)
    order, padding = GlobalOrder(len(index), 0), []
    times: dict[str, list[float]] = {"padded": [], "packed": []}
    for turn in tqdm(range(rounds + 2), desc="packing"):
        drawn = [index.read(int(number)) for number in order.take(turn * samples, samples)]
        losses = []
        for way in times:
            collate.packed = way == "packed"
            batch = collate(drawn)
            began = time.perf_counter()
            losses.append(step([batch], dict.fromkeys(rates, 0.0))["loss/total"])
            if turn > 1:
                times[way].append(time.perf_counter() - began)
            if way == "padded":
                padding.append(1 - float(batch.attention_mask.float().mean()))
        assert abs(losses[0] - losses[1]) < 1e-3 * abs(losses[0]), "the two ways must agree"
    medians = {way: statistics.median(values) for way, values in times.items()}
    return {
        "samples": samples,
        "rounds": rounds,
        "padding_share": round(statistics.mean(padding), 3),
        "seconds": {way: round(value, 4) for way, value in medians.items()},
        "packed_to_padded": round(medians["packed"] / medians["padded"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["phantom", "wide", "packing", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "tools/results/step_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    distributed.adopt_launcher()
    door.start({})
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        if options.preset in ("phantom", "all"):
            results["phantom"] = measure("phantom", 16, options.rounds, ASSETS / "phantom_student")
        if options.preset in ("wide", "all"):
            results["wide"] = measure("wide", 2, options.rounds, wide_student(Path(scratch) / "wide"))
        if options.preset in ("packing", "all"):
            results["packing"] = measure_packing(16, options.rounds, Path(scratch) / "phantoms")
    door.stop()
    facts = {
        "command": shlex.join(["python", "tools/benchmark_step.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}",
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(facts | results, indent=2) + "\n")
    print(json.dumps(facts | results, indent=2))


if __name__ == "__main__":
    main()
