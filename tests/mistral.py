"""The vocabulary of Mistral 7B from mistral-common: SentencePiece's own model, and tokenizers built from it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

# LLaVA-Med's template: no space before an answer, and the prompt ends with "[/INST]".
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %} [/INST]{% else %}{% for part in message['content'] %} {{ part['text'] }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece_model() -> Path:
    """Return Mistral's tokenizer.model (version 1); skip the test if the packages are not installed."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed (pip install medalign[dev])")
    found = find_spec("mistral_common")  # only its file is used, not its code
    if found is None or not found.submodule_search_locations:
        pytest.skip("mistral-common, which contains Mistral's vocabulary, is not installed (pip install medalign[dev])")
    return Path(found.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


def prepend_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Build a fast tokenizer as in Llama's and Mistral's first tokenizer.json: the normalizer prepends a space."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    vocabulary, _, merges = SentencePieceExtractor(str(sentencepiece_model())).extract()
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    )
    return _finished(
        PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"), template
    )


def slow_tokenizer(template: str = TEMPLATE) -> Any:
    """Build the same tokenizer as a slow one, which uses SentencePiece itself."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    return _finished(
        SentencePieceBackend(
            vocab_file=str(sentencepiece_model()), bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=True
        ),
        template,
    )


def _finished(tokenizer: Any, template: str) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True, normalized=False)]})
    tokenizer.chat_template = template
    return tokenizer
