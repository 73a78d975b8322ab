"""The student: a model of transformers, LoRA, W at the input of block l, and a tap at block l.

    block l-1 -> X -> X~ = X + epsilon X W^T -> block l (its attention is tapped) -> ...
                           |
                           +-> tokens for the spatial loss

Shape suffixes: B samples, L tokens, I images, N tokens of an image, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from medalign.contracts import IGNORE, Batch, StudentOutput
from medalign.errors import ConfigError
from medalign.geometry import gather_images
from medalign.student.capture import attach
from medalign.student.families import ModelSpec
from medalign.student.packing import layout, samples_apart
from medalign.student.query_mixture import QueryMixture
from medalign.student.steering import Steering


class Student(nn.Module):
    """A LLaVA-class model (with or without adapters) that can be steered and tapped.

    Args:
        model: the transformers model, or a peft model around it.
        anatomy: where its parts are.
        layer: the tapped block l; W acts on its input.
        steering: W, or None.
        mixture: the query-adaptive mixture of block l, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: ModelSpec,
        layer: int,
        steering: Steering | None = None,
        mixture: QueryMixture | None = None,
    ) -> None:
        super().__init__()
        self.model: Any
        require_layer(layer, anatomy)
        self.model = model
        self.steering = steering
        self.mixture = mixture
        self.anatomy = anatomy
        self.layer = layer
        self.tap = attach(anatomy.attentions[layer])
        self._image_index: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None
        self._dummy: torch.Tensor | None = None  # pixels of the batch without images that is about to pass
        self._dummy_tokens: torch.Tensor | None = None
        anatomy.language_model.register_forward_pre_hook(self._look_at_dummy, with_kwargs=True)
        anatomy.blocks[layer - 1].register_forward_hook(self._at_input_of_block)
        if mixture is not None:
            mixture.attach(anatomy.attentions[layer].q_proj)

    def forward(self, batch: Batch, *, tap: bool = True) -> StudentOutput:
        """One pass over a padded (on either side) or packed batch; logits are kept where some sample is supervised."""
        kept = (batch.labels[:, 1:] != IGNORE).any(0).nonzero()[:, 0]
        self._begin(batch)
        has_image = bool((batch.image_index >= 0).any())
        pixels = batch.student_pixels.to(self.dtype)
        self._dummy = None if has_image else pixels
        columns = batch.image_index >= 0
        with samples_apart(batch), self.tap.reading(self._rows(batch, tap), columns, batch.attention_mask):
            output = self.model(
                input_ids=batch.input_ids,
                pixel_values=pixels if has_image else None,
                logits_to_keep=kept,
                use_cache=False,
                **layout(batch),
            )
        tokens, attention = self._collect(batch) if tap else (None, None)
        return StudentOutput(logits=output.logits, kept=kept, tokens=tokens, attention=attention)

    @torch.no_grad()
    def generate(self, batch: Batch, **settings: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Answers for a left-padded batch without answers, and the question's attention while reading it.

        Returns token ids [B, T] of the answers alone, and the map [I, N], None for a batch without images.
        """
        has_image = bool((batch.image_index >= 0).any())
        self._begin(batch)
        with self.tap.reading(self._rows(batch, True), batch.image_index >= 0, batch.attention_mask):
            ids = self.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask.long(),
                pixel_values=batch.student_pixels.to(self.dtype) if has_image else None,
                **settings,
            )
        attention = self._collect(batch)[1] if has_image else None
        return ids[:, batch.input_ids.shape[1] :], attention

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end an answer: the model's own, from its generation settings, and those added by `end_with`."""
        own = self.model.generation_config.eos_token_id
        return [] if own is None else [own] if isinstance(own, int) else list(own)

    def end_with(self, token: int) -> None:
        """Let this token end answers too."""
        self.model.generation_config.eos_token_id = sorted({*self.end_tokens, token})

    def trainable(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters that learn, by group: adapters, mixture, steering, projector. Empty groups are left out."""
        projector = {id(p) for p in self.anatomy.projector.parameters()}
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            part = name.split(".")[0]
            group = "projector" if id(parameter) in projector else "adapters" if part == "model" else part
            groups.setdefault(group, []).append((name, parameter))
        return groups

    def _begin(self, batch: Batch) -> None:
        self._image_index, self._tokens, self._dummy_tokens = batch.image_index, None, None
        if self.mixture is not None:
            self.mixture.begin(batch.question_mask, batch.bounds() if batch.lengths else None)

    def _rows(self, batch: Batch, tap: bool) -> torch.Tensor:
        return batch.rows if tap else torch.zeros_like(batch.rows)

    def _look_at_dummy(self, _decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """A batch without images still runs the vision tower once, at the place where others do.

        Under ZeRO-3 every rank must enter the same modules in the same order. The features come in with weight
        zero, so that a trained projector is part of the graph on every rank.
        """
        if self._dummy is None:
            return None
        features = self.model.get_image_features(pixel_values=self._dummy).pooler_output
        self._dummy, self._dummy_tokens = None, torch.stack(tuple(features))
        embeddings = kwargs["inputs_embeds"]
        return args, kwargs | {"inputs_embeds": embeddings + 0 * self._dummy_tokens.sum().to(embeddings.dtype)}

    def _at_input_of_block(self, _block: nn.Module, _inputs: Any, hidden: Any) -> Any:
        index = self._image_index
        hidden_BLD = hidden[0] if isinstance(hidden, tuple) else hidden
        # While answering, passes after the first bring single new tokens, none of them an image's.
        if index is None or hidden_BLD.shape[1] != index.shape[1]:
            return hidden
        if self.steering is not None:
            copies = hidden_BLD.shape[0] // index.shape[0]  # beams of a sample follow one another
            hidden_BLD = self.steering(hidden_BLD, (index >= 0).repeat_interleave(copies, dim=0))
        self._tokens = hidden_BLD
        return (hidden_BLD, *hidden[1:]) if isinstance(hidden, tuple) else hidden_BLD

    def _collect(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_BLD, map_BL, dummy_IND = self._tokens, self.tap.map, self._dummy_tokens
        self._tokens = self.tap.map = self._dummy_tokens = None
        if hidden_BLD is None or map_BL is None:
            raise RuntimeError(f"block {self.layer} was not tapped: the model did not run its registered attention")
        if dummy_IND is not None:
            # Weight zero, yet tied to the same tensors as elsewhere: ZeRO-3 counts the outputs that a gradient reaches.
            return dummy_IND + 0 * hidden_BLD.sum(), (0 * map_BL.sum()).expand(dummy_IND.shape[:2])
        images, tokens = len(batch.image_weight), self.anatomy.grid.size
        return (
            gather_images(hidden_BLD, batch.image_index, images, tokens),
            gather_images(map_BL, batch.image_index, images, tokens),
        )


def require_layer(layer: int, anatomy: ModelSpec) -> None:
    """Raises ConfigError where the student has no such block to tap, or none before it."""
    if not 1 <= layer < len(anatomy.blocks):
        raise ConfigError(
            f"student.layer is {layer}, but the student's blocks are numbered 0 to {len(anatomy.blocks) - 1} "
            "and block 0 has none before it to steer"
        )


@torch.no_grad()
def check_causality(student: Student, batch: Batch) -> None:
    """Changes the last token of each sample and requires that no logit before it moves, in its sample or another.

    Raises RuntimeError otherwise: the attention backend ignores the causal mask, or the borders between the samples
    of a packed batch. Every rank must call it.
    """
    was_training = student.training
    student.eval()
    last_BL = _last_tokens(batch)
    one, other = [token for token in (10, 11, 12) if token != student.anatomy.image_token_id][:2]
    changed = torch.where(batch.input_ids == one, other, one).where(last_BL, batch.input_ids)
    before = replace(batch, labels=torch.where(batch.attention_mask, batch.input_ids, IGNORE))
    first, second = student(before, tap=False), student(replace(before, input_ids=changed), tap=False)
    earlier = (batch.attention_mask & ~last_BL)[:, first.kept]
    moved = (first.logits - second.logits).abs().amax(-1)[earlier]
    student.train(was_training)
    if moved.numel() and moved.max() > 0:
        raise RuntimeError(f"a future token changed an earlier logit by {moved.max():.2e}: attention is not causal")


def _last_tokens(batch: Batch) -> torch.Tensor:
    """[B, L] bool: the last valid token of each sample."""
    valid = batch.attention_mask.flatten()
    places = torch.arange(len(valid), device=valid.device) * valid
    last_S = places.new_zeros(len(batch.bounds()) - 1)
    last_S.scatter_reduce_(0, batch.sample_of_token().flatten(), places, "amax")
    return torch.zeros_like(valid).index_fill_(0, last_S, True).view_as(batch.attention_mask)
