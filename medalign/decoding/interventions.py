"""Interventions on the attention of single blocks, for use with `student.capture.intervening`.

They work in the pass over the prompts and in later passes with a cache, with padding on the left, several images per
sample, grouped queries, softcaps, sliding windows and beams. A block without an intervention keeps its backend. So does
a block with one, apart from what the intervention changes: the last row of the pass, or a factor per head.

Shape suffixes: B samples, R rows of a pass (B, or the beams of each sample one after another), H query heads, G key
heads, L tokens of the prompts, K keys, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medalign.student.capture import Output


class AmplifiedImage:
    """Raises the scores of the image's columns in the last row of each pass, `A + alpha |A|`, before the softmax.

    The last row of the first pass is the prompt's last token; each later pass has one row.

    Args:
        image_BL: True at the image tokens of the prompts.
        alpha: how far the scores are raised.
        new_tokens: the most tokens that are generated.
    """

    def __init__(self, image_BL: torch.Tensor, alpha: float, new_tokens: int) -> None:
        self._gain_B1P = F.pad(alpha * image_BL.float(), (0, new_tokens))[:, None]  # P: places of prompt and answer
        self._passed = 0

    def __call__(
        self,
        attend: Any,
        module: nn.Module,
        query_RHLD: torch.Tensor,
        key_RGKD: torch.Tensor,
        value_RGKD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        **kwargs: Any,
    ) -> Output:
        """Compute all rows but the last one by the backend, and the last one here."""
        rows, keys = query_RHLD.shape[0], key_RGKD.shape[2]
        self._passed += query_RHLD.shape[2]
        gain_R1K = self._gain_B1P[..., self._passed - keys : self._passed]  # a cache with a window keeps the last keys
        if rows > len(gain_R1K):
            gain_R1K = gain_R1K.repeat_interleave(rows // len(gain_R1K), dim=0)
        scores_RHK = last_scores(query_RHLD, key_RGKD, **kwargs)
        scores_RHK = torch.addcmul(scores_RHK, scores_RHK.abs(), gain_R1K)
        weights_RHK = mask_scores(scores_RHK, attention_mask, **kwargs).softmax(-1)
        last_RHD = mix_values(weights_RHK, value_RGKD)
        if query_RHLD.shape[2] == 1:
            return last_RHD[:, None], None
        output_RLHD, _ = attend(module, query_RHLD, key_RGKD, value_RGKD, attention_mask, **kwargs)
        output_RLHD[:, -1] = last_RHD
        return output_RLHD, None


class RecordedHeads:
    """Records the output of each head in the last row of the first pass, in `last_BHD`, and changes nothing."""

    def __init__(self) -> None:
        self.last_BHD: torch.Tensor | None = None

    def __call__(self, attend: Any, module: nn.Module, /, *inputs: Any, **kwargs: Any) -> Output:
        """Call the backend, and record its last row if it is the first call."""
        output: Output = attend(module, *inputs, **kwargs)
        if self.last_BHD is None:
            self.last_BHD = output[0][:, -1].float()
        return output


class RecordedRow:
    """Records the attention weights of the last row of each pass in `weights_RHK`, and changes nothing."""

    def __init__(self) -> None:
        self.weights_RHK: torch.Tensor | None = None

    def __call__(
        self,
        attend: Any,
        module: nn.Module,
        query_RHLD: torch.Tensor,
        key_RGKD: torch.Tensor,
        value_RGKD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        **kwargs: Any,
    ) -> Output:
        """Call the backend and compute the weights of its last row."""
        scores_RHK = last_scores(query_RHLD, key_RGKD, **kwargs)
        self.weights_RHK = mask_scores(scores_RHK, attention_mask, **kwargs).softmax(-1)
        output: Output = attend(module, query_RHLD, key_RGKD, value_RGKD, attention_mask, **kwargs)
        return output


def last_scores(
    query_RHLD: torch.Tensor,
    key_RGKD: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return the scores of a pass's last row, [R, H, K] in float32, before the mask and the softmax.

    Args:
        query_RHLD: post-rotary queries.
        key_RGKD: post-rotary keys.
        scaling: factor of the scores; None for 1 / sqrt(D).
        softcap: the scores are capped smoothly at this size.
    """
    (rows, heads), size = query_RHLD.shape[:2], query_RHLD.shape[-1]
    key_SKD = key_RGKD.flatten(0, 1)  # S: rows and key heads
    query_SND = query_RHLD[:, :, -1].reshape(len(key_SKD), -1, size)  # N queries share a key
    # matmul would expand and reshape both first: operations that the host pays for in each block and for each token.
    scores_RHK = torch.bmm(query_SND, key_SKD.transpose(1, 2)).view(rows, heads, -1).float()
    scores_RHK = scores_RHK * (size**-0.5 if scaling is None else scaling)
    return scores_RHK if softcap is None else softcap * torch.tanh(scores_RHK / softcap)


def mask_scores(
    scores_RHK: torch.Tensor, attention_mask: torch.Tensor | None, *, sliding_window: int | None = None, **_: Any
) -> torch.Tensor:
    """Return the scores of the last row with -inf at the keys that it may not see.

    Args:
        scores_RHK: scores.
        attention_mask: of SDPA or eager attention, [R, 1, L, K] bool or added to the scores; of flash-attention, [R, K]
            with 0 at padding; None if all keys are visible but for the window.
        sliding_window: how many keys a row sees, the last ones; the masks of SDPA and eager attention contain it.
    """
    keys = scores_RHK.shape[-1]
    if attention_mask is not None and attention_mask.ndim == 4:
        row_R1K = attention_mask[:, :, -1, :keys]
        hidden_R1K = ~row_R1K if row_R1K.dtype == torch.bool else row_R1K < torch.finfo(row_R1K.dtype).min / 2
        return scores_RHK.masked_fill(hidden_R1K, -torch.inf)
    if attention_mask is not None:
        scores_RHK = scores_RHK.masked_fill(attention_mask[:, None, -keys:] == 0, -torch.inf)
    if sliding_window is not None and keys > sliding_window:
        scores_RHK = F.pad(scores_RHK[..., -sliding_window:], (keys - sliding_window, 0), value=-torch.inf)
    return scores_RHK


def mix_values(weights_RHK: torch.Tensor, value_RGKD: torch.Tensor) -> torch.Tensor:
    """Return the mean of the values under the weights, [R, H, D]."""
    rows, heads, keys = weights_RHK.shape
    value_SKD = value_RGKD.flatten(0, 1)
    weights_SNK = weights_RHK.to(value_SKD.dtype).view(len(value_SKD), -1, keys)
    return torch.bmm(weights_SNK, value_SKD).view(rows, heads, -1)
