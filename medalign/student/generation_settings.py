"""The generation settings of a base model, of which only the special tokens are used."""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig

log = logging.getLogger("medalign")

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# Nothing about answers: their limit is max_new_tokens.
_DESCRIPTIVE = (
    "transformers_version",
    "max_length",
    "use_cache",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
)


def keep_only_tokens(model: Any) -> None:
    """Remove all but the special tokens from a model's generation settings, and log what is removed.

    `generation_config.json` of a model may have a penalty for repetition or a temperature, which would change answers
    although nobody asked for it.

    Args:
        model: the transformers model itself.
    """
    own: GenerationConfig = model.generation_config
    known = (*_TOKENS, *_DESCRIPTIVE)
    values = {name: value for name, value in own.to_diff_dict().items() if name not in known and name[0] != "_"}
    if values:
        shown = ", ".join(f"{name} {value}" for name, value in sorted(values.items()))
        log.info("not applied from the base model's generation settings: %s", shown)
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in _TOKENS})
