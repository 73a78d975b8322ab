"""Next-token negative log-likelihood on the answer tokens (the paper's L_LM).

B samples, L tokens, K kept positions, V vocabulary, T supervised tokens, S samples of a packed batch.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F

from medalign.config.schema.losses import LanguageMean
from medalign.contracts import IGNORE, Batch, LossValue, StudentOutput, TeacherTargets
from medalign.losses.term import LossTerm, check_choice

MEANS = get_args(LanguageMean)


class LanguageTerm(LossTerm):
    """The language loss, named "language".

    Args:
        coefficient: factor in the total.
        mean: "tokens" for the mean over the answer tokens of the global batch, "samples" for the mean over each
            sample's answer tokens and then over the samples of the global batch.

    Raises:
        ValueError: the coefficient is negative, or `mean` is unknown.
    """

    def __init__(self, coefficient: float = 1.0, *, mean: str = "tokens") -> None:
        super().__init__("language", coefficient)
        check_choice("language_mean", mean, MEANS)
        self.mean = mean

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the number of supervised tokens, or of samples with a supervised token."""
        sample_BL = self._sample_of_token(batch)
        return supervised_tokens(batch.labels) if sample_BL is None else supervised_samples(batch.labels, sample_BL)

    def compute(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossValue:
        """Return the summed loss and its count."""
        return language_model(output.logits, output.kept, batch.labels, self._sample_of_token(batch))

    def _sample_of_token(self, batch: Batch) -> torch.Tensor | None:
        return batch.sample_of_token() if self.mean == "samples" else None


def language_model(
    logits_BKV: torch.Tensor, kept_K: torch.Tensor, labels_BL: torch.Tensor, sample_BL: torch.Tensor | None = None
) -> LossValue:
    """Compute the summed loss and the number of supervised tokens.

    With `sample_BL`, compute the sum of each sample's mean loss and the number of samples with a supervised token.

    Args:
        logits_BKV: any float dtype; the logit at position p predicts the label at p + 1. Only the rows that
            predict a supervised token are converted to float32.
        kept_K: int64, the positions at which logits were kept.
        labels_BL: int64, not shifted; IGNORE at tokens that are not supervised. The first label does not count,
            because no token before it could predict it.
        sample_BL: int64, index of the sample that each token belongs to, from 0. Padding may have any index.

    Returns:
        Sum and count, float32 scalars.

    Raises:
        ValueError: a shape does not match, or the logit of a supervised token was not kept.
    """
    target_BK = _targets(logits_BKV, kept_K, labels_BL)
    supervised_BK = target_BK != IGNORE
    target_T = target_BK[supervised_BK]
    logits_TV = logits_BKV[supervised_BK].float()
    if sample_BL is None:
        return LossValue(F.cross_entropy(logits_TV, target_T, reduction="sum"), count=supervised_BK.sum().float())
    loss_T = F.cross_entropy(logits_TV, target_T, reduction="none")
    sample_T = F.pad(sample_BL[:, 1:], (0, 1))[:, kept_K][supervised_BK]
    tokens_S = supervised_by_sample(labels_BL, sample_BL)
    return LossValue(sum=(loss_T / tokens_S[sample_T]).sum(), count=(tokens_S > 0).sum().float())


def _targets(logits_BKV: torch.Tensor, kept_K: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Return the label that each kept logit predicts, [B, K], after a check that none is missing."""
    if logits_BKV.shape[:2] != (labels_BL.shape[0], kept_K.shape[0]):
        raise ValueError(
            f"language_model: logits {tuple(logits_BKV.shape)} must be [{labels_BL.shape[0]}, {kept_K.shape[0]}, V] "
            f"for labels {tuple(labels_BL.shape)} and {kept_K.shape[0]} kept positions"
        )
    # The last position predicts a token beyond the sequence.
    target_BK = F.pad(labels_BL[:, 1:], (0, 1), value=IGNORE)[:, kept_K]
    found, expected = (target_BK != IGNORE).sum(), supervised_tokens(labels_BL)
    if found != expected:  # the only wait for the device
        raise ValueError(
            f"language_model: logits were kept for {int(found)} of {int(expected)} supervised tokens; "
            "keep every position that comes before a label"
        )
    return target_BK


def supervised_tokens(labels_BL: torch.Tensor) -> torch.Tensor:
    """Return the number of labels of the batch that count, a float32 scalar."""
    return (labels_BL[:, 1:] != IGNORE).sum().float()


def supervised_samples(labels_BL: torch.Tensor, sample_BL: torch.Tensor) -> torch.Tensor:
    """Return the number of samples of the batch that have a label that counts, a float32 scalar."""
    return (supervised_by_sample(labels_BL, sample_BL) > 0).sum().float()


def supervised_by_sample(labels_BL: torch.Tensor, sample_BL: torch.Tensor) -> torch.Tensor:
    """Return the number of labels of each sample that count, [B * L] float32; 0 beyond the samples of the batch.

    The length is the number of tokens, because it is known without waiting for the device.
    """
    supervised_BL = (labels_BL[:, 1:] != IGNORE).float()
    tokens_S = torch.zeros(labels_BL.numel(), device=labels_BL.device)
    return tokens_S.index_add_(0, sample_BL[:, 1:].flatten(), supervised_BL.flatten())
