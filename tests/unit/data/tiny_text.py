"""A real tokenizer with an LLaVA-like chat template, built in the test."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from medalign.contracts import ImageTokens
from medalign.data.batches.prompts import PromptEncoder
from medalign.geometry import PatchGrid

TEMPLATE = (
    "{% for m in messages %}{{ ' ' if not loop.first }}{{ m['role'].upper() }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
WORDS = [
    "USER",
    "ASSISTANT",
    ":",
    "probe",
    "is",
    "there",
    "a",
    "nodule",
    "in",
    "zone",
    "?",
    "yes",
    "no",
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "lungs",
    "clear",
    "with",
    "some",
    "effusion",
]


def tokenizer(template: str | None = TEMPLATE, bos: bool = True, pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad
    )
    outer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    outer.chat_template = template
    return outer


def encoder(max_length: int = 64, max_images: int = 1, **changes: object) -> PromptEncoder:
    """An image has a grid of 3 x 3 tokens."""
    text = tokenizer(**changes)
    return PromptEncoder(
        text,
        image=ImageTokens(text.convert_tokens_to_ids("<image>"), PatchGrid(3, 3)),
        max_length=max_length,
        max_images=max_images,
    )
