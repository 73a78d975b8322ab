"""The text tower of a CLIP in open_clip's format, to embed a few prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from tokenizers import Tokenizer

from medalign.errors import ConfigError, from_library
from medalign.teacher.source import TeacherSource
from medalign.teacher.towers.hf_bert_text import embed_with_bert
from medalign.teacher.weights import VISION, load_exactly, read_weights

_BPE_SIZE = 49408  # vocabulary of OpenAI's CLIP, which open_clip brings
_BERT_LENGTH = 256  # tokens, in BiomedCLIP and UniMed-CLIP
_BERT_NAMES = ("BiomedBERT", "PubMedBERT")
_FIRST_TOKEN = "cls_last_hidden_state_pooler"
_STUB_VISION = {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1}
_OWN, UNIMED = "text.", "text_encoder."  # names of the text tower: open_clip's where it is a part of its own, UniMed's
_SCALARS = ("logit_scale", "logit_bias", "attn_mask", "input_resolution", "context_length", "vocab_size")


def embed_texts(source: TeacherSource, texts: Sequence[str]) -> torch.Tensor:
    """Embed texts with the text tower of a model in open_clip's format: float32 [n, e].

    Args:
        source: the teacher.
        texts: n texts.

    Raises:
        ConfigError: the text tower or its tokenizer is not supported.
        CheckpointError: its weights cannot be read or do not fit.
    """
    text_config = source.config.get("text_cfg", {})
    state = {key: value for key, value in read_weights(source.weights).items() if not key.startswith(VISION)}
    if any(key.startswith(UNIMED) for key in state):
        return _embed_with_bert(source, state, UNIMED, texts)
    if text_config.get("hf_model_name"):
        _require_biomedbert(source, text_config)
        return _embed_with_bert(source, state, _OWN, texts)
    ids = _tokenize(source, text_config, texts)
    config = {key: source.config[key] for key in ("embed_dim", "quick_gelu") if key in source.config}
    try:
        tower = open_clip.CustomTextCLIP(**config, vision_cfg=_STUB_VISION, text_cfg=text_config).text
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(
            f"teacher {source.name}: open_clip cannot build text_cfg ({type(error).__name__}: {error})"
        ) from error
    prefix = _OWN if any(key.startswith(_OWN) for key in state) else ""
    own = {key: value for key, value in state.items() if key not in _SCALARS}
    load_exactly(tower, own, source.weights, prefix=prefix)
    with torch.no_grad():
        features: torch.Tensor = tower.eval()(ids)
        return features


def _require_biomedbert(source: TeacherSource, text_config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the text tower is one that is built here: others would be downloaded."""
    name = text_config["hf_model_name"]
    pooler = text_config.get("hf_pooler_type", text_config.get("pooler_type"))
    if not any(part in name for part in _BERT_NAMES) or pooler != _FIRST_TOKEN:
        raise ConfigError(
            f"teacher {source.name}: its text tower is {name} with pooler {pooler!r}; supported for text-conditioned "
            f"attention: open_clip's own text transformer, and BiomedBERT with {_FIRST_TOKEN!r}; set "
            "teacher.text_weight to 0"
        )


def _embed_with_bert(
    source: TeacherSource, state: Mapping[str, torch.Tensor], prefix: str, texts: Sequence[str]
) -> torch.Tensor:
    words = state.get(f"{prefix}transformer.embeddings.word_embeddings.weight")
    tokenizer = _read_tokenizer(source, 0 if words is None else len(words))
    tokenizer.enable_truncation(_BERT_LENGTH)
    tokenizer.enable_padding()
    return embed_with_bert(state, prefix, source.weights, tokenizer, texts)


def _tokenize(source: TeacherSource, text_config: Mapping[str, Any], texts: Sequence[str]) -> torch.Tensor:
    """Token ids [n, context length], padded with 0, from OpenAI's vocabulary or from tokenizer.json."""
    length = text_config.get("context_length", open_clip.CLIPTextCfg.context_length)
    size = text_config.get("vocab_size", open_clip.CLIPTextCfg.vocab_size)
    if size == _BPE_SIZE:
        ids: torch.Tensor = open_clip.SimpleTokenizer(context_length=length)(list(texts))
        return ids
    tokenizer = _read_tokenizer(source, size)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])


def _read_tokenizer(source: TeacherSource, size: int) -> Tokenizer:
    """Read tokenizer.json beside the weights. Raises ConfigError unless it has `size` words."""
    file = Path(source.weights).parent / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        if not from_library(error):
            raise
        raise ConfigError(
            f"teacher {source.name}: its vocabulary has {size} words, but {file} cannot be read ({error}); copy the "
            "tokenizer.json of its text tower there, or set teacher.text_weight to 0"
        ) from error
    if tokenizer.get_vocab_size() != size:
        raise ConfigError(
            f"teacher {source.name}: {file} has {tokenizer.get_vocab_size()} words, but its text tower has {size}; "
            "copy the tokenizer.json of its text tower there"
        )
    return tokenizer
