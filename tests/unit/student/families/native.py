"""Small models of random weights in the format of transformers, each with its own processor and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)

from tests import tiny

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]


def words(specials: list[str], eos: str, bos: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens, after the special ones; line ends merge, as in large vocabularies."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "ĊĊĊ"]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=specials[0], extra_special_tokens=named
    )


def sharpen(model: nn.Module) -> None:
    """Larger weights than the default start, so that attention and answers are not all alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4.0)


def save_gemma3(folder: Path) -> Path:
    """Blocks with a window shorter than a sample, and full attention in the last; answers end with <end_of_turn>."""
    torch.manual_seed(0)
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *names.values()]
    tokenizer = words(specials, "<eos>", "<bos>", **names)
    text = Gemma3TextConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=20,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        bos_token_id=2,
        eos_token_id=1,
    )
    vision = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
        vision_use_head=False,
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=16,
        boi_token_index=6,
        eoi_token_index=7,
        image_token_index=8,
        eos_token_id=[1, 5],
    )
    model = Gemma3ForConditionalGeneration(config)
    sharpen(model)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # it starts as zero
    model.save_pretrained(folder)
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    Gemma3Processor(images, tokenizer, chat_template=GEMMA, image_seq_length=16).save_pretrained(folder)
    return folder


def save_qwen25(folder: Path) -> Path:
    """Patches of 4 pixels, 2 x 2 of them in a token, windows in the tower."""
    torch.manual_seed(0)
    tokenizer = words(QWEN, "<|im_end|>")
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = SIZES | {"vocab_size": len(tokenizer), "rope_parameters": rotary, "bos_token_id": 0, "eos_token_id": 2}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_ids(tokenizer), tie_word_embeddings=False)
    model = Qwen2_5_VLForConditionalGeneration(config)
    sharpen(model)
    model.save_pretrained(folder)
    patches = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096}}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**patches), tokenizer, Qwen2VLVideoProcessor(**patches), chat_template=CHATML
    ).save_pretrained(folder)
    return folder


def save_qwen3(folder: Path) -> Path:
    """As above, with features of the tower's first block added after the first block of the decoder."""
    torch.manual_seed(0)
    tokenizer = words(QWEN, "<|im_end|>")
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    rotary = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, "mrope_interleaved": True}
    text = SIZES | {"vocab_size": len(tokenizer), "head_dim": 8, "rope_parameters": rotary, "eos_token_id": 2}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **_ids(tokenizer), tie_word_embeddings=False)
    model = Qwen3VLForConditionalGeneration(config)
    sharpen(model)
    model.save_pretrained(folder)
    patches = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096}}
    colors = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(**patches, **colors),
        tokenizer,
        Qwen3VLVideoProcessor(**patches, **colors),
        chat_template=CHATML,
    ).save_pretrained(folder)
    return folder


def save_internvl(folder: Path) -> Path:
    """Patches of 4 pixels, 2 x 2 of them in a token, a class token, and tiles that are not used here."""
    torch.manual_seed(0)
    images = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *images.values(), "<video>"]
    tokenizer = words(specials, "<|im_end|>", **images, video_token="<video>")
    vision = InternVLVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[32, 32],
        patch_size=[4, 4],
    )
    text = Qwen2Config(**SIZES, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=2)
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=5, image_seq_length=16)
    model = InternVLForConditionalGeneration(config)
    sharpen(model)
    model.save_pretrained(folder)
    InternVLProcessor(
        GotOcr2ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        InternVLVideoProcessor(),
        image_seq_length=16,
        chat_template=CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n"),
    ).save_pretrained(folder)
    return folder


def save_llava_siglip(folder: Path) -> Path:
    """A tower without a class token whose size, 36, is not a multiple of its patches of 8 pixels."""
    tower = SiglipVisionConfig(image_size=36, patch_size=8, vision_use_head=False, **TOWER)
    return _with_tower(folder, tower, "full")


def save_llava_dinov2(folder: Path) -> Path:
    """A tower of DINOv2, with a class token."""
    return _with_tower(folder, Dinov2Config(image_size=32, patch_size=8, mlp_ratio=2, **TOWER), "default")


TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def save_llava_next(folder: Path) -> Path:
    """Tiles of 16 pixels, patches of 8: an image of 32 pixels is 4 + 4 * (4 + 1) tokens."""
    torch.manual_seed(0)
    tokenizer, text = _llama()
    tower = CLIPVisionConfig(image_size=16, patch_size=8, **TOWER)
    config = LlavaNextConfig(
        vision_config=tower, text_config=text, image_token_index=3, image_grid_pinpoints=PINPOINTS, pad_token_id=0
    )
    model = LlavaNextForConditionalGeneration(config)
    sharpen(model.model.language_model)
    model.save_pretrained(folder)
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
    )
    LlavaNextProcessor(
        images, tokenizer, 8, "default", chat_template=tiny.TEMPLATE, num_additional_image_tokens=1
    ).save_pretrained(folder)
    return folder


def save_llava_onevision(folder: Path) -> Path:
    """The same with a tower of SigLIP."""
    torch.manual_seed(0)
    tokenizer, text = _llama()
    tower = SiglipVisionConfig(image_size=16, patch_size=8, vision_use_head=False, **TOWER)
    config = LlavaOnevisionConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=3,
        video_token_index=200,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        pad_token_id=0,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    sharpen(model.model.language_model)
    model.save_pretrained(folder)
    images = LlavaOnevisionImageProcessor(size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS)
    LlavaOnevisionProcessor(
        images, tokenizer, LlavaOnevisionVideoProcessor(), 4, "full", chat_template=tiny.TEMPLATE
    ).save_pretrained(folder)
    return folder


PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _llama() -> tuple[PreTrainedTokenizerFast, LlamaConfig]:
    tokenizer = tiny.tokenizer()
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return tokenizer, LlamaConfig(**SIZES, vocab_size=len(tokenizer), **ids)


def _with_tower(folder: Path, tower: PreTrainedConfig, strategy: Literal["default", "full"]) -> Path:
    tiny.save_student(folder)
    known = LlavaConfig.from_pretrained(folder)
    config = LlavaConfig(
        vision_config=tower,
        text_config=known.text_config,
        image_token_index=3,
        vision_feature_select_strategy=strategy,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    sharpen(model.model.language_model)  # a sharp tower would mix its patches
    model.save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings |= {"vision_feature_select_strategy": strategy, "num_additional_image_tokens": int(strategy == "default")}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"vision_start": QWEN[3], "vision_end": QWEN[4], "image": QWEN[5], "video": QWEN[6]}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
