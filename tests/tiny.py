"""Tiny real models: transformers' own classes with random weights, saved as ordinary folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from medalign.contracts import IGNORE, Batch
from medalign.teacher.source import CONFIG_NAME, WEIGHTS_NAME
from medalign.teacher.towers.open_clip_vit import build_clip

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes, which encodes every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
        extra_special_tokens={"image_token": "<image>"},
    )


def save_student(
    folder: Path,
    *,
    blocks: int = 3,
    seed: int = 0,
    image_size: int = 32,
    kind: type[PreTrainedConfig] = LlamaConfig,
    **language: Any,
) -> Path:
    """Save a LLaVA of random weights: 8-pixel patches (a 4 x 4 grid), grouped-query attention, width 32.

    `kind` is the configuration class of the language model, and `language` its further settings.
    """
    torch.manual_seed(seed)
    words = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
    )
    text = kind(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **language,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3, pad_token_id=0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # larger than the default weights, so that attention and answers differ
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0 if "proj" in name else 2.0)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def batch(
    *,
    texts: tuple[tuple[int, int], ...] = ((5, 4), (9, 2)),
    images: bool = True,
    side: str = "right",
    tokens: int = 16,
    size: int = 32,
    seed: int = 0,
) -> Batch:
    """Build samples with one image each, or none: <s>, image tokens, then tokens (question, answer) as in `texts`."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, (question, answer) in enumerate(texts):
        span = tokens if images else 0
        ids = torch.cat([torch.tensor([1] + [3] * span), torch.randint(10, 200, (question + answer,), generator=draw)])
        index = torch.cat([torch.tensor([-1] + [number] * span), torch.full((question + answer,), -1)])
        asked = torch.zeros(len(ids), dtype=torch.bool)
        asked[1 + span : 1 + span + question] = images
        labels = torch.full((len(ids),), IGNORE)
        labels[1 + span + question :] = ids[1 + span + question :]
        rows.append((ids, index, asked, labels))
    longest = max(len(row[0]) for row in rows)

    def pad(values: torch.Tensor, fill: int) -> torch.Tensor:
        rest = torch.full((longest - len(values),), fill, dtype=values.dtype)
        return torch.cat([values, rest] if side == "right" else [rest, values])

    count = len(rows) if images else 1
    pixels = torch.randn(count, 3, size, size, generator=draw)
    return Batch(
        input_ids=torch.stack([pad(row[0], 0) for row in rows]),
        attention_mask=torch.stack([pad(torch.ones(len(row[0]), dtype=torch.bool), 0) for row in rows]),
        labels=torch.stack([pad(row[3], IGNORE) for row in rows]),
        question_mask=torch.stack([pad(row[2], 0) for row in rows]),
        image_index=torch.stack([pad(row[1], -1) for row in rows]),
        student_pixels=pixels,
        teacher_pixels=pixels,
        image_weight=torch.full((count,), float(images)),
        patch_valid=torch.full((count, tokens), images),
        image_sample=torch.arange(count),
        keys=tuple(f"sample-{i}" for i in range(len(rows))),
    )


def packed(padded: Batch) -> Batch:
    """Concatenate the samples of a batch in one row."""
    valid = padded.attention_mask
    rows = ("input_ids", "attention_mask", "labels", "question_mask", "image_index")
    flat = {name: getattr(padded, name)[valid][None] for name in rows}
    return replace(padded, lengths=tuple(valid.sum(1).tolist()), **flat)


def save_teacher(folder: Path, *, image_size: int = 48, seed: int = 0) -> Path:
    """Save an open_clip CLIP of random weights: 6 x 6 patches of 8 pixels, unlike the student's 4 x 4."""
    torch.manual_seed(seed)
    model_config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": image_size, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(build_clip(model_config).state_dict(), folder / WEIGHTS_NAME)
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (folder / CONFIG_NAME).write_text(json.dumps({"model_cfg": model_config, "preprocess_cfg": preprocess}))
    return folder


def save_run(folder: Path, student: Path) -> Path:
    """Save an export of a student in `student` whose W is not zero."""
    from medalign.checkpoint.export import write_export
    from medalign.config import LoraConfig, StudentConfig
    from medalign.student.loading import load_student

    settings = StudentConfig(path=str(student), layer=2, lora=LoraConfig(rank=4, alpha=8), attention="sdpa")
    trained = load_student(settings, torch.float32)
    torch.manual_seed(1)
    torch.nn.init.normal_(trained.steering.weight, std=0.05)
    whole = {name: value.detach() for named in trained.trainable().values() for name, value in named}
    write_export(trained, whole, settings, 160, folder)
    return folder
