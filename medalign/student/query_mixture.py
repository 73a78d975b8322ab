"""The query-adaptive mixture on the query projection of the tapped block (the paper's appendix).

    p = softmax(router(x_q))                           x_q: hidden state of the sample's last question token
    y = base(x) + alpha / r * sum_e p_e B_e A_e x      for every token x of the sample

The router makes one decision per sample. It is dense: every expert contributes.

Shape suffixes: B batch rows, S samples, L tokens, T tokens of all rows, D input width, O output width, E experts,
R rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class QueryMixture(nn.Module):
    """LoRA experts with a linear router.

    The second factors of the experts are initialized to zero, so an untrained mixture does not change the projection.

    Args:
        width: D, input width of the projection.
        width_out: O, output width of the projection.
        experts: E, number of experts.
        rank: r of each expert.
        alpha: the mixture is multiplied by alpha / r.
        lora_start: initialize the first factors as LoRA does (Kaiming uniform) instead of from a normal distribution.
        dropout: dropout probability at the input of the experts; the router has no dropout.
    """

    def __init__(
        self,
        width: int,
        width_out: int,
        experts: int = 4,
        rank: int = 16,
        alpha: float = 8.0,
        *,
        lora_start: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Parameter(torch.randn(experts, rank, width) / width**0.5)
        if lora_start:
            for expert in self.down.data:
                nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        self.up = nn.Parameter(torch.zeros(experts, width_out, rank))
        self.scaling = alpha / rank
        self._question_BL: torch.Tensor | None = None
        self._bounds: torch.Tensor | None = None
        self.decided: torch.Tensor | None = None  # [B, 1, E]: the decision of each row, for generated tokens

    def forward(self, hidden_BLD: torch.Tensor, gates_BE: torch.Tensor | None = None) -> torch.Tensor:
        """Compute what to add to the output of the projection.

        Args:
            hidden_BLD: input of the projection.
            gates_BE: weights of the experts. By default the router computes them from the question that `begin`
                announced, and later passes of another length (the single tokens of generation) reuse them.

        Returns:
            [B, L, O], in the data type of `hidden_BLD`.

        Raises:
            RuntimeError: no batch was announced, or its complete sequence has not passed yet.
        """
        gates_BLE = self._decide(hidden_BLD) if gates_BE is None else gates_BE[:, None]
        dtype = self.down.dtype
        inner_BLER = torch.einsum("bld,erd->bler", self.dropout(hidden_BLD).to(dtype), self.down)
        weighted_BLER = inner_BLER * (self.scaling * gates_BLE).to(dtype)[..., None]
        return torch.einsum("bler,eor->blo", weighted_BLER, self.up).to(hidden_BLD.dtype)

    def begin(
        self,
        question_mask_BL: torch.Tensor,
        bounds: torch.Tensor | None = None,
        valid_BL: torch.Tensor | None = None,
    ) -> None:
        """Announce a new batch.

        The router reads the last question token of each sample, or the first token of a sample without a question.

        Args:
            question_mask_BL: True at question tokens.
            bounds: [S + 1], start of each sample of a packed batch and end of the last one.
            valid_BL: False at padding; None if no row begins with padding.
        """
        if valid_BL is not None:  # a first token is before all questions of its sample
            question_mask_BL = question_mask_BL | (valid_BL & (valid_BL.cumsum(1) == 1))
        self._question_BL, self._bounds, self.decided = question_mask_BL, bounds, None

    def attach(self, projection: nn.Module) -> None:
        """Add the mixture to the output of `projection` in every forward pass after `begin` was called.

        If the output is wider than O, as that of a projection of queries, keys and values in one, the mixture is added
        to the first O values.
        """
        projection.register_forward_hook(self._add_to)

    def route(
        self, hidden_BLD: torch.Tensor, question_mask_BL: torch.Tensor, bounds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the weights of the experts from the last question token of each sample.

        Args:
            hidden_BLD: input of the projection.
            question_mask_BL: True at question tokens.
            bounds: [S + 1], see `begin`.

        Returns:
            [B, L, E] in float32; the weights of a token are those of its sample.
        """
        rows, length = question_mask_BL.shape
        tokens_T = torch.arange(rows * length, device=hidden_BLD.device)
        bounds = tokens_T.new_tensor(range(0, rows * length + 1, length)) if bounds is None else bounds
        sample_T = torch.searchsorted(bounds[1:], tokens_T, right=True)
        asked_T = tokens_T * question_mask_BL.flatten()
        last_S = bounds[:-1].scatter_reduce(0, sample_T, asked_T, "amax")  # or the first token of the sample
        chosen_SD = hidden_BLD.flatten(0, 1)[last_S]
        gates_SE = self.router(chosen_SD.to(self.router.weight.dtype)).float().softmax(-1)
        gates_BLE: torch.Tensor = gates_SE[sample_T].unflatten(0, (rows, length))
        return gates_BLE

    def _decide(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        question_BL = self._question_BL
        if question_BL is None:
            raise RuntimeError("QueryMixture: call begin(question_mask) before the forward pass, or pass gates_BE")
        if hidden_BLD.shape[1] == question_BL.shape[1]:
            # The gates are recomputed for every pass of the complete sequence, so that gradient checkpointing can
            # repeat the pass.
            copies = hidden_BLD.shape[0] // question_BL.shape[0]  # the beams of a sample are consecutive rows
            gates_BLE = self.route(hidden_BLD, question_BL.repeat_interleave(copies, dim=0), self._bounds)
            self.decided = gates_BLE[:, -1:].detach()
            return gates_BLE
        if self.decided is None or hidden_BLD.shape[0] % self.decided.shape[0]:
            raise RuntimeError(
                f"QueryMixture: got hidden states of shape {tuple(hidden_BLD.shape)} before the complete sequence of "
                f"shape {tuple(question_BL.shape)} that begin() announced"
            )
        return self.decided.repeat_interleave(hidden_BLD.shape[0] // self.decided.shape[0], dim=0)

    def _add_to(self, _projection: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if self._question_BL is None:
            return output
        added_BLO = self(inputs[0])
        return output + F.pad(added_BLO, (0, output.shape[-1] - added_BLO.shape[-1]))

    def extra_repr(self) -> str:
        """Return the settings for the text of the module."""
        experts, rank, width = self.down.shape
        return f"width={width}, experts={experts}, rank={rank}, scaling={self.scaling}"
