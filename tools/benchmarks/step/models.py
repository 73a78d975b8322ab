"""Students and teachers to benchmark: the packaged ones, and random weights of other shapes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from medalign.config import Config, StudentConfig, load
from medalign.contracts import IGNORE, Batch
from medalign.student.backends import attention_names
from medalign.student.loading import adapt, load_student
from medalign.student.model import Student
from medalign.teacher.loading import load_teacher
from medalign.teacher.model import Teacher
from medalign.teacher.source import CONFIG_NAME

ASSETS = Path(__file__).resolve().parents[3] / "medalign" / "assets"
LLAVA_TEACHER = {"image_size": 336, "layers": 24, "width": 1024, "patch_size": 14}  # ViT-L/14 at 336 pixels
TINY_TEACHER = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}


@dataclass(frozen=True)
class Text:
    """Numbers of text tokens in a sample."""

    before: int = 1
    question: int = 24
    answer: int = 16


@dataclass(frozen=True)
class Shape:
    """A student of random weights: `language` and `vision` are settings of Mistral and of CLIP's tower."""

    language: dict[str, Any]
    vision: dict[str, Any]
    teacher: dict[str, Any]
    text: Text
    rank: int = 32

    def with_blocks(self, blocks: int) -> Shape:
        """Return the same shape with another number of decoder blocks."""
        return replace(self, language=self.language | {"num_hidden_layers": blocks})

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return self.language["num_hidden_layers"]


# LLaVA-Med 1.5: Mistral 7B and CLIP ViT-L/14 at 336 pixels, with 34 tokens of system text before the image.
LLAVA = Shape(
    language={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    teacher=LLAVA_TEACHER,
    text=Text(before=34, question=24, answer=40),
)
TINY = Shape(
    language={
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    vision={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    teacher=TINY_TEACHER,
    text=Text(question=6, answer=4),
    rank=4,
)


def settings(samples: int, engine: str, layer: int | None = None, rank: int | None = None) -> Config:
    """Load the settings of the packaged recipe, with one micro-batch per step."""
    words = ["--data.train", "none", "--train.batch_size", str(samples), "--train.micro_batch_size", str(samples)]
    words += ["--engine.deepspeed", engine]
    if layer is not None:
        words += ["--student.layer", str(layer), "--student.train_projector", "false"]
    if rank is not None:
        words += ["--student.lora.rank", str(rank)]
    return load("phantom", words)


def tapped_layer(blocks: int) -> int:
    """Return the block at the relative depth of block 20 of 32, but never the first block."""
    return max(1, blocks * 20 // 32)


def random_student(shape: Shape, config: StudentConfig, device: torch.device, dtype: torch.dtype) -> Student:
    """Build a LLaVA student of random weights."""
    text = MistralConfig(**shape.language, head_dim=None, sliding_window=None, max_position_embeddings=4096)
    image_token = shape.language["vocab_size"] - 1
    whole = LlavaConfig(vision_config=CLIPVisionConfig(**shape.vision), text_config=text, image_token_index=image_token)
    return _untrained(whole, config, device, dtype)


def wide_student(config: StudentConfig, device: torch.device, dtype: torch.dtype) -> Student:
    """Build the packaged student's architecture with LLaVA's 576 image tokens, width 512 and 6 blocks."""
    whole = AutoConfig.from_pretrained(ASSETS / "phantom_student")
    whole.vision_config.image_size, whole.vision_config.patch_size = 336, 14
    text = whole.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1408, 6
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 8, 2, 64
    return _untrained(whole, config, device, dtype)


def _untrained(whole: PreTrainedConfig, config: StudentConfig, device: torch.device, dtype: torch.dtype) -> Student:
    """Build a student of random weights on the device, because billions of random numbers take minutes on a CPU."""
    names = attention_names(config.attention, dtype)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(whole, dtype=dtype, attn_implementation=names)
    return adapt(model, config, dtype)


def packaged_student(config: StudentConfig, _device: torch.device, dtype: torch.dtype) -> Student:
    """Load the packaged student."""
    return load_student(config, dtype)


def random_teacher(vision: dict[str, int], folder: Path, device: torch.device, dtype: torch.dtype) -> Teacher:
    """Build a tower of open_clip with random weights, and write its configuration to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    colors = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision}, "preprocess_cfg": colors}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return load_teacher(folder, device, dtype, random_weights_seed=0)


def make_batch(student: Student, teacher_size: int, samples: int, text: Text) -> Batch:
    """Build a batch of random pixels and tokens: per sample one image, a question and an answer."""
    grid, anatomy = student.spec.grid.size, student.spec
    first, length = text.before + grid, text.before + grid + text.question + text.answer
    words = [token for token in range(10, 100) if token != anatomy.image_token_id]
    ids = torch.tensor(words)[torch.randint(len(words), (samples, length))]
    ids[:, text.before : first] = anatomy.image_token_id
    index = torch.full((samples, length), -1)
    index[:, text.before : first] = torch.arange(samples)[:, None]
    asked = torch.zeros(samples, length, dtype=torch.bool)
    asked[:, first : first + text.question] = True
    labels = ids.clone()
    labels[:, : first + text.question] = IGNORE
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
