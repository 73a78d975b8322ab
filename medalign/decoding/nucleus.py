"""Nucleus sampling whose draws depend only on the seed and the sample.

Shape suffixes: B samples, T new tokens, V vocabulary size, L tokens so far.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


class NucleusSampler:
    """A logits processor that draws one token per sample, and leaves it as the only possible one.

    Token t of a sample is the quantile u_t of its nucleus, in the order of probability. u is a sequence of uniform
    random numbers that depends only on the seed and the sample's key, so the answer does not depend on the other
    samples of the batch, or on the number of ranks.

    Args:
        temperature: the logits are divided by it.
        top_p: the nucleus is the smallest set of most probable tokens with at least this probability.
        seed: of all samples.
        limit: most new tokens, T.
        keys: the key of each sample. Rows with the same key draw the same numbers.
        prompt: L of the prompts, padding included.
        device: where the logits are.
    """

    def __init__(
        self,
        temperature: float,
        top_p: float,
        seed: int,
        limit: int,
        keys: Sequence[str],
        prompt: int,
        device: torch.device,
    ) -> None:
        self._temperature, self._top_p, self._prompt = temperature, top_p, prompt
        draws = [torch.rand(limit, dtype=torch.float64, generator=generator_of(seed, key)) for key in keys]
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


def generator_of(seed: int, key: str) -> torch.Generator:
    """Return a generator of random numbers on the CPU, which depends only on the arguments.

    Args:
        seed: of all samples.
        key: of the sample.
    """
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
