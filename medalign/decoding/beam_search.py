"""Beam search of one sample, step by step, for methods that look ahead or go back.

With all tokens as choices it finds what the beam search of transformers finds, whose rules it follows: the sum of log
probabilities is divided by the length, and the search ends when the best running hypothesis, divided by its length so
far, is not better than the worst of as many finished ones as there are beams.

Shape suffixes: R beams, T tokens so far, N choices per beam, K continuations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

_NONE = -1e9  # score of a beam that is not in use yet, as in transformers


class Finished(NamedTuple):
    """A finished hypothesis."""

    score: float  # the mean log probability of its tokens
    tokens: torch.Tensor  # [T] int64


@dataclass(frozen=True)
class Beams:
    """The hypotheses of a sample.

    Attributes:
        tokens_RT: tokens so far of the running ones, int64, the best one first.
        scores_R: sum of their log probabilities, float32.
        finished: the best finished ones, at most R, the best one first.
    """

    tokens_RT: torch.Tensor
    scores_R: torch.Tensor
    finished: tuple[Finished, ...] = ()

    @classmethod
    def start(cls, count: int, device: torch.device) -> Beams:
        """Return `count` empty hypotheses, of which only the first one is in use: all have the same continuations."""
        scores_R = torch.full((count,), _NONE, device=device)
        scores_R[0] = 0
        return cls(torch.empty(count, 0, dtype=torch.long, device=device), scores_R)

    @property
    def in_use(self) -> torch.Tensor:
        """Which hypotheses are in use, bool [R]."""
        return self.scores_R > _NONE / 2

    def advance(
        self, tokens_RN: torch.Tensor, log_probs_RN: torch.Tensor, ends: torch.Tensor, limit: int
    ) -> tuple[Beams, torch.Tensor]:
        """Add a token to each hypothesis.

        Args:
            tokens_RN: the choices of each beam, int64.
            log_probs_RN: their log probabilities; -inf for what must not be chosen.
            ends: tokens that end an answer.
            limit: the most tokens of an answer.

        Returns:
            The new hypotheses, and the place of the choice of each running one among the R * N, int64 [R].
        """
        beams, choices = log_probs_RN.shape
        # Enough continuations that `beams` of them remain, even if all end tokens are among the best.
        count = min(max(2, 1 + len(ends)) * beams, beams * choices)
        totals_K, places_K = (log_probs_RN + self.scores_R[:, None]).flatten().topk(count)
        last_K = tokens_RN.flatten()[places_K]
        tokens_KT = torch.cat([self.tokens_RT[places_K // choices], last_K[:, None]], dim=1)
        length = tokens_KT.shape[1]
        ended_K = torch.isin(last_K, ends) | (length == limit)
        means = (totals_K[:beams] / length).tolist()
        new = (ended_K & totals_K.isfinite())[:beams].nonzero().flatten().tolist()
        found = [Finished(means[place], tokens_KT[place]) for place in new]
        finished = sorted([*self.finished, *found], key=lambda hypothesis: -hypothesis.score)[:beams]
        scores_R, running_R = (totals_K + ended_K * _NONE).topk(beams)
        return Beams(tokens_KT[running_R], scores_R, tuple(finished)), places_K[running_R]

    def is_done(self, limit: int) -> bool:
        """Whether no better hypothesis is expected, or the limit of tokens is reached."""
        length = self.tokens_RT.shape[1]
        if length == limit:
            return True
        if len(self.finished) < len(self.scores_R):
            return False
        return float(self.scores_R[0] / length) <= self.finished[-1].score
