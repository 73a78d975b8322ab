"""How answers are decoded: greedily, by beam search, or by nucleus sampling that depends only on seed and sample.

Shape suffixes: B samples, T new tokens, V vocabulary size, L tokens so far.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from medalign.errors import ConfigError

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


@dataclass(frozen=True)
class Decoding:
    """Settings of generation. The default is greedy decoding.

    Attributes:
        max_new_tokens: limit of an answer, in tokens.
        num_beams: beams of beam search; 1 is greedy. The sum of log probabilities is divided by the length.
        do_sample: sample from the nucleus.
        top_p: the nucleus is the smallest set of most probable tokens with at least this probability.
        temperature: the logits are divided by it before.
        seed: with a sample's key, seeds the sample's own random numbers.

    Raises:
        ConfigError: a value is out of range, or has no effect.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    do_sample: bool = False
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_option(name)} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is {self.top_p}; it must be greater than 0 and at most 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"--temperature is {self.temperature}; it must be greater than 0")
        if self.do_sample and self.num_beams > 1:
            raise ConfigError(f"--num-beams {self.num_beams} and --do-sample exclude each other; choose one of them")
        for name, default in (("top_p", 1.0), ("temperature", 1.0), ("seed", 0)):
            if not self.do_sample and getattr(self, name) != default:
                raise ConfigError(
                    f"{_option(name)} {getattr(self, name)} has no effect without --do-sample; add it, or leave "
                    f"{_option(name)} out"
                )

    def arguments(self, keys: Sequence[str], prompt: int, device: torch.device) -> dict[str, Any]:
        """Return the arguments of `Student.generate` for a batch.

        Args:
            keys: the key of each sample.
            prompt: L of the prompts, padding included.
            device: the student's device.
        """
        found: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": False,  # transformers would draw from one generator for the whole batch
        }
        if self.do_sample:
            found["logits_processor"] = [NucleusSampler(self, keys, prompt, device)]
        return found


class NucleusSampler:
    """A logits processor that draws one token per sample, and leaves it as the only possible one.

    Token t of a sample is the quantile u_t of its nucleus, in the order of probability. u is a sequence of uniform
    random numbers that depends only on the seed and the sample's key, so the answer does not depend on the other
    samples of the batch, or on the number of ranks.

    Args:
        decoding: temperature, top_p, seed and the limit of new tokens.
        keys: the key of each sample.
        prompt: L of the prompts, padding included.
        device: where the logits are.
    """

    def __init__(self, decoding: Decoding, keys: Sequence[str], prompt: int, device: torch.device) -> None:
        self._temperature, self._top_p, self._prompt = decoding.temperature, decoding.top_p, prompt
        draws = [_uniform(decoding.seed, key, decoding.max_new_tokens) for key in keys]
        self._draws_BT = torch.stack(draws).to(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V] that are 0 at the drawn token of each sample and -inf elsewhere.

        Args:
            input_ids: tokens so far, [B, L].
            scores: logits, [B, V].
        """
        u_B1 = self._draws_BT[:, input_ids.shape[1] - self._prompt, None]
        probability_BV, tokens_BV = (scores.double() / self._temperature).softmax(-1).sort(descending=True, stable=True)
        upper_BV = probability_BV.cumsum(-1)
        kept_B1 = (upper_BV - probability_BV < self._top_p).sum(-1, keepdim=True)
        total_B1 = upper_BV.gather(1, kept_B1 - 1)
        place_B1 = (upper_BV <= u_B1 * total_B1).sum(-1, keepdim=True).minimum(kept_B1 - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens_BV.gather(1, place_B1), 0.0)


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


def _uniform(seed: int, key: str, count: int) -> torch.Tensor:
    """Return float64 random numbers in [0, 1) on the CPU, which depend only on the arguments."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
