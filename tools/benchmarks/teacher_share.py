"""Measure each kind of teacher's share of a step, as CPU time of one thread, in one process.

OMP_NUM_THREADS=1 python -m tools.benchmarks.teacher_share --output tools/benchmarks/results/teacher_share.json

Random weights in float32 and one image. The student is a LLaVA of 7 billion parameters as in `teacher_flops`: CLIP's
L/14 tower at 336 pixels, and 32 frozen decoder blocks with 676 tokens, forward and backward to the activations. To fit
a small machine, a part of each is measured and multiplied: two blocks of a transformer tower, at its real width and
number of patches, and one decoder block with a quarter of the tokens. The output layer and the adapters are left out.
The parts take turns, and CPU time does not count other processes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from jsonargparse import auto_cli
from transformers import Dinov2Config, Dinov2Model, MistralConfig, MistralModel, SiglipVisionConfig, SiglipVisionModel

from medalign.teacher.towers import Tower
from medalign.teacher.towers.biovil import BioVilTower, ImageModel
from medalign.teacher.towers.hf_dinov2 import HFDinov2Tower
from medalign.teacher.towers.hf_siglip import HFSiglipTower
from medalign.teacher.towers.open_clip_resnet import OpenClipResNetTower
from medalign.teacher.towers.open_clip_vit import OpenClipTower
from tools.benchmarks.teacher_flops import IMAGE_TOKENS, SO400M, TEXT_TOKENS, visual

MEASURED, DECODER_BLOCKS, PART_OF_TOKENS = 2, 32, 4


class Kind(NamedTuple):
    """A kind of tower: how to build it with MEASURED blocks, and its whole depth (0: it is measured whole)."""

    build: Callable[[], Tower]
    depth: int


def vit(architecture: str) -> Callable[[], Tower]:
    """Build a tower of open_clip with MEASURED blocks."""

    def build() -> Tower:
        config: dict[str, Any] = open_clip.get_model_config(architecture)
        config["vision_cfg"]["layers"] = MEASURED
        return OpenClipTower(visual(config))

    return build


TEACHERS = {
    "ViT-L/14 at 336 (UniMed-CLIP)": Kind(vit("ViT-L-14-336-quickgelu"), 24),
    "ViT-B/16 at 224 (UniMed-CLIP, BiomedCLIP)": Kind(vit("ViT-B-16-quickgelu"), 12),
    "ViT-B/32 at 224 (CheXzero, PubMedCLIP)": Kind(vit("ViT-B-32-quickgelu"), 12),
    "SigLIP So400m/14 at 448 (MedSigLIP)": Kind(
        lambda: HFSiglipTower(
            SiglipVisionModel(
                SiglipVisionConfig(**{**SO400M, "num_hidden_layers": MEASURED}, image_size=448, patch_size=14)
            )
        ),
        27,
    ),
    "DINOv2 B/14 at 518 (RAD-DINO)": Kind(
        lambda: HFDinov2Tower(Dinov2Model(Dinov2Config(num_hidden_layers=MEASURED, image_size=518, patch_size=14))),
        12,
    ),
    "ResNet-50 of OpenAI at 224 (PubMedCLIP, PMC-CLIP)": Kind(
        lambda: OpenClipResNetTower(visual(open_clip.get_model_config("RN50"))), 0
    ),
    "ResNet-50 at 448 (BioViL)": Kind(lambda: BioVilTower(ImageModel(temporal=False)), 0),
}
STUDENT = "ViT-L/14 at 336 (UniMed-CLIP)"  # the student's tower has its shape


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Return the CPU time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def tower_run(tower: Tower, memory_format: torch.memory_format = torch.contiguous_format) -> Callable[[], None]:
    """Return a call that computes features and attention of one image."""
    tower = tower.eval().requires_grad_(False).to(memory_format=memory_format)
    pixels = torch.randn(1, 3, tower.image_size, tower.image_size).to(memory_format=memory_format)

    def run() -> None:
        with torch.no_grad():
            streams = tower.encode(pixels)
            tower.features(streams)
            tower.attention(streams)

    return run


def decoder_run() -> Callable[[], None]:
    """Return a call that runs one frozen decoder block with a part of the tokens, forward and backward."""
    config = MistralConfig(vocab_size=8, num_hidden_layers=1, sliding_window=None)
    block = MistralModel(config).requires_grad_(False)
    tokens = (IMAGE_TOKENS + TEXT_TOKENS) // PART_OF_TOKENS
    inputs = torch.randn(1, tokens, config.hidden_size, requires_grad=True)

    def run() -> None:
        block(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum().backward()

    return run


def main(rounds: int = 3, output: Path | None = None) -> None:
    """Measure, and print or write the result.

    Args:
        rounds: rounds that are measured, after one that is not.
        output: JSON file; None prints only.
    """
    torch.manual_seed(0)
    runs: dict[str, Callable[[], None]] = {"decoder": decoder_run()}
    for name, kind in TEACHERS.items():
        runs[name] = tower_run(kind.build())
        if not kind.depth:
            runs[f"{name}, channels last"] = tower_run(kind.build(), torch.channels_last)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            seconds = cpu_seconds(run)
            if turn:
                times[name].append(seconds)
    part = {name: statistics.median(values) for name, values in times.items()}
    whole = {name: part[name] * (kind.depth / MEASURED or 1) for name, kind in TEACHERS.items()}
    student = part["decoder"] * PART_OF_TOKENS * DECODER_BLOCKS + whole[STUDENT]
    result = {
        "command": "python -m tools.benchmarks.teacher_share --output tools/benchmarks/results/teacher_share.json",
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "share": {name: round(seconds / (seconds + student), 4) for name, seconds in whole.items()},
        "channels_last": {
            name: round(part[f"{name}, channels last"] / part[name], 3)
            for name, kind in TEACHERS.items()
            if not kind.depth
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
