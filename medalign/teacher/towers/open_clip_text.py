"""The text tower of open_clip's CLIP, to embed a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from tokenizers import Tokenizer

from medalign.errors import ConfigError, from_library
from medalign.teacher.source import TeacherSource
from medalign.teacher.weights import VISION, load_exactly, read_weights

_BPE_SIZE = 49408  # vocabulary of OpenAI's CLIP, which open_clip brings
_STUB_VISION = {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1}
_OWN = "text."  # name of the text tower in models whose text tower is a part of its own
_SCALARS = ("logit_scale", "logit_bias", "attn_mask", "input_resolution", "context_length", "vocab_size")


def embed_texts(source: TeacherSource, texts: Sequence[str]) -> torch.Tensor:
    """Embed texts with the text tower of an open_clip model: float32 [n, e].

    Args:
        source: the teacher.
        texts: n texts.

    Raises:
        ConfigError: the text tower or its tokenizer is not supported.
        CheckpointError: its weights cannot be read or do not fit.
    """
    text_config = source.config.get("text_cfg", {})
    if text_config.get("hf_model_name"):
        raise ConfigError(
            f"teacher {source.name}: its text tower is {text_config['hf_model_name']}; supported for text-conditioned "
            "attention: open_clip's own text transformer; set teacher.text_weight to 0"
        )
    ids = _tokenize(source, texts)
    config = {key: source.config[key] for key in ("embed_dim", "quick_gelu") if key in source.config}
    try:
        tower = open_clip.CustomTextCLIP(**config, vision_cfg=_STUB_VISION, text_cfg=text_config).text
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(
            f"teacher {source.name}: open_clip cannot build text_cfg ({type(error).__name__}: {error})"
        ) from error
    state = {key: value for key, value in read_weights(source.weights).items() if not key.startswith(VISION)}
    prefix = _OWN if any(key.startswith(_OWN) for key in state) else ""
    load_exactly(
        tower, {key: value for key, value in state.items() if key not in _SCALARS}, source.weights, prefix=prefix
    )
    with torch.no_grad():
        features: torch.Tensor = tower.eval()(ids)
        return features


def _tokenize(source: TeacherSource, texts: Sequence[str]) -> torch.Tensor:
    """Token ids [n, context length], padded with 0, from OpenAI's vocabulary or from tokenizer.json."""
    text_config = source.config["text_cfg"]
    length = text_config.get("context_length", open_clip.CLIPTextCfg.context_length)
    size = text_config.get("vocab_size", open_clip.CLIPTextCfg.vocab_size)
    if size == _BPE_SIZE:
        ids: torch.Tensor = open_clip.SimpleTokenizer(context_length=length)(list(texts))
        return ids
    file = Path(source.weights).parent / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        if not from_library(error):
            raise
        raise ConfigError(
            f"teacher {source.name}: its vocabulary has {size} words, but {file} cannot be read ({error}); copy the "
            "model's tokenizer.json there, or set teacher.text_weight to 0"
        ) from error
    if tokenizer.get_vocab_size() != size:
        raise ConfigError(
            f"teacher {source.name}: {file} has {tokenizer.get_vocab_size()} words, but text_cfg.vocab_size is {size}; "
            "copy the model's tokenizer.json there"
        )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])
