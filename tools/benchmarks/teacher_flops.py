"""Count the floating-point operations of each published teacher, and its share of a step on paper.

python -m tools.benchmarks.teacher_flops --output tools/benchmarks/results/teacher_flops.json

Everything runs on the meta device: shapes only, no weights. The student is a LLaVA of 7 billion parameters (Mistral
behind CLIP's L/14 at 336 pixels, 576 image tokens) on one image with 100 tokens of text: its forward pass, and a
backward pass to the activations, since the weights are frozen. The adapters' own operations, below 2 %, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from jsonargparse import auto_cli
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    MistralConfig,
    MistralForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from medalign.teacher.source import TeacherSource
from medalign.teacher.towers import Tower
from medalign.teacher.towers.biovil import BioVilTower, ImageModel
from medalign.teacher.towers.hf_dinov2 import HFDinov2Tower
from medalign.teacher.towers.hf_siglip import HFSiglipTower
from medalign.teacher.towers.open_clip_resnet import OpenClipResNetTower
from medalign.teacher.towers.open_clip_vit import OpenClipTower, build_visual
from medalign.teacher.towers.timm_vit import TimmTower

TEXT_TOKENS, IMAGE_TOKENS = 100, 576
LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
BIOMEDCLIP: dict[str, Any] = {
    "timm_model_name": "vit_base_patch16_224",
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": 224,
}


def visual(config: dict[str, Any]) -> Any:
    """Build the vision tower of an open_clip configuration."""
    return build_visual(TeacherSource("", "", config, Path(), (0.5,) * 3, (0.5,) * 3))


def named(architecture: str) -> Tower:
    """Build a tower that open_clip knows by name."""
    return OpenClipTower(visual(open_clip.get_model_config(architecture)))


TEACHERS: dict[str, Callable[[], Tower]] = {
    "UniMed-CLIP ViT-L/14 at 336": lambda: named("ViT-L-14-336-quickgelu"),
    "UniMed-CLIP ViT-B/16 at 224": lambda: named("ViT-B-16-quickgelu"),
    "CheXzero, PubMedCLIP ViT-B/32 at 224": lambda: named("ViT-B-32-quickgelu"),
    "BiomedCLIP ViT-B/16 at 224": lambda: TimmTower(visual({"embed_dim": 512, "vision_cfg": BIOMEDCLIP})),
    "PubMedCLIP RN50 at 224": lambda: OpenClipResNetTower(visual(open_clip.get_model_config("RN50-quickgelu"))),
    "MedSigLIP at 448": lambda: HFSiglipTower(
        SiglipVisionModel(SiglipVisionConfig(**SO400M, image_size=448, patch_size=14))
    ),
    "RAD-DINO at 518": lambda: HFDinov2Tower(Dinov2Model(Dinov2Config(image_size=518, patch_size=14))),
    "BioViL at 448": lambda: BioVilTower(ImageModel(temporal=False)),
}


def count(run: Callable[[], Any]) -> float:
    """Count the operations of a call, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def teacher_flops(tower: Tower) -> float:
    """Count the operations of features and attention of one image."""
    pixels = torch.empty(1, 3, tower.image_size, tower.image_size, device="meta")

    def run() -> None:
        streams = tower.encode(pixels)
        tower.features(streams)
        tower.attention(streams)

    return count(run)


def student_flops() -> dict[str, float]:
    """Count the operations of the student's tower, and of its decoder forward and backward."""
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**LARGE, image_size=336, patch_size=14)).eval()
        decoder = MistralForCausalLM(MistralConfig(vocab_size=32000, sliding_window=None)).requires_grad_(False)
        pixels = torch.empty(1, 3, 336, 336)
        inputs = torch.empty(1, IMAGE_TOKENS + TEXT_TOKENS, decoder.config.hidden_size, requires_grad=True)
    logits: list[torch.Tensor] = []
    with torch.no_grad():
        vision = count(lambda: tower(pixels))
    forward = count(lambda: logits.append(decoder(inputs_embeds=inputs, logits_to_keep=TEXT_TOKENS).logits))
    return {"tower": vision, "forward": forward, "backward": count(lambda: logits[0].sum().backward())}


def main(output: Path | None = None) -> None:
    """Count, and print or write the result.

    Args:
        output: JSON file; None prints only.
    """
    student = student_flops()
    whole = sum(student.values())
    teachers = {}
    for name, build in TEACHERS.items():
        with torch.device("meta"):
            tower = build().eval()
        flops = teacher_flops(tower)
        parameters = sum(parameter.numel() for parameter in tower.parameters()) / 1e6
        share = flops / (flops + whole)
        teachers[name] = {
            "gflop": round(flops, 1),
            "million_parameters": round(parameters, 1),
            "share": round(share, 4),
        }
    result = {
        "command": "python -m tools.benchmarks.teacher_flops --output tools/benchmarks/results/teacher_flops.json",
        "student_gflop": {name: round(value) for name, value in student.items()},
        "teachers": teachers,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
