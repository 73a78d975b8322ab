"""The student: a transformers model with W at the input of block l, and an attention capture at block l.

    block l-1 -> X -> X~ = X + epsilon X W^T -> block l (its attention is tapped) -> ...
                           |
                           +-> tokens for the spatial loss

Several blocks can be tapped, each with its own W.

Shape suffixes: B samples, L tokens, T generated tokens, I images, N cells per image, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from medalign.contracts import IGNORE, Batch, StudentOutput, TappedBlock
from medalign.errors import ConfigError
from medalign.geometry import gather_images
from medalign.student.capture import attach_capture
from medalign.student.families.base import ModelSpec
from medalign.student.packing import forward_arguments, without_packed_mask
from medalign.student.query_mixture import QueryMixture
from medalign.student.steering import Steering
from medalign.student.views import View, reading_views, repeated


class Student(nn.Module):
    """A vision-language model, with or without adapters, with steering and attention captures.

    Args:
        model: the transformers model, or a peft model that wraps it.
        spec: locations of the model's parts.
        layers: indices of the tapped blocks; W acts on the input of each. The first one's attention is reported, and it
            has the query mixture.
        steering: W of each tapped block, or none.
        mixture: the query-adaptive mixture of the first tapped block, or None.

    Raises:
        ConfigError: a block does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        layers: Sequence[int],
        steering: Sequence[Steering] = (),
        mixture: QueryMixture | None = None,
    ) -> None:
        super().__init__()
        self.model: Any
        for layer in layers:
            require_layer(layer, spec)
        self.model = model
        # A single W keeps the name that it has in checkpoints and exports: steering.weight.
        self.steering: Any = nn.ModuleList(steering) if len(steering) > 1 else next(iter(steering), None)
        self.mixture = mixture
        self.spec = spec
        self.layers = tuple(layers)
        self.attention_captures = [attach_capture(spec.attentions[layer]) for layer in layers]
        self._cells: torch.Tensor | None = None
        self._tokens: dict[int, torch.Tensor] = {}  # by block
        self._dummy: torch.Tensor | None = None  # pixels for a batch without images, until its forward pass
        self._dummy_tokens: torch.Tensor | None = None
        spec.language_model.register_forward_pre_hook(self._run_vision_tower_on_dummy, with_kwargs=True)
        for place, layer in enumerate(layers):
            spec.blocks[layer].register_forward_pre_hook(partial(self._steer_block_input, place), with_kwargs=True)
        if mixture is not None:
            mixture.attach(spec.query_projection(self.layer)[0])

    def forward(self, batch: Batch, *, tap: bool = True) -> StudentOutput:
        """Run the model on a padded or packed batch. Under ZeRO-3, call it on every rank.

        Args:
            batch: padding may be on either side.
            tap: whether to return the image tokens and the attention of the tapped blocks.

        Returns:
            The logits at positions where at least one sample is supervised and, with `tap`, the tokens [I, N, D] and
            the attention [I, N] of each tapped block.
        """
        kept = (batch.labels[:, 1:] != IGNORE).any(0).nonzero()[:, 0]
        self._begin_batch(batch)
        has_image = bool((batch.image_index >= 0).any())
        pixels = batch.student_pixels.to(self.dtype)
        self._dummy = None if has_image else pixels
        layout = forward_arguments(batch)
        layout["position_ids"] = self.spec.family.positions(self.spec, batch, layout["position_ids"])
        with without_packed_mask(batch), self._recording(batch, self._rows(batch, tap)):
            output = self.model(
                input_ids=batch.input_ids,
                logits_to_keep=kept,
                use_cache=False,
                **layout,
                **self.spec.family.inputs(self.spec, batch, pixels if has_image else None),
            )
        if not tap:
            return StudentOutput(logits=output.logits, kept=kept, tokens=None, attention=None)
        first, *others = self._collect(batch)
        return StudentOutput(output.logits, kept, first.tokens, first.attention, tuple(others))

    @torch.no_grad()
    def generate(
        self, batch: Batch, views: Sequence[View] = (), **settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Generate answers for a batch of questions and capture the attention of each question.

        Args:
            batch: left-padded and without answers.
            views: how the prompts are read, see `student.views`; without any, once and as they are.
            **settings: passed to `generate` of the transformers model.

        Returns:
            Token ids [B, T] of the answers without the prompts, those of further views behind them, and the attention
            [I, N] of the first tapped block, None for a batch without images.
        """
        read = repeated(batch, max(1, len(views)))
        has_image = bool((batch.image_index >= 0).any())
        pixels = read.student_pixels.to(self.dtype) if has_image else None
        self._begin_batch(batch)
        prompt, parts = batch.input_ids.shape[1], (self.attention_captures, self.mixture)
        with self._recording(batch, batch.rows), reading_views(self.spec.language_model, views, prompt, *parts):
            ids = self.model.generate(
                input_ids=read.input_ids,
                attention_mask=read.attention_mask.long(),
                **self.spec.family.inputs(self.spec, read, pixels),
                **settings,
            )
        attention = self._collect(batch)[0].attention if has_image else None
        return ids[:, prompt:], attention

    @torch.no_grad()
    def read(self, batch: Batch, features_TD: torch.Tensor, *, use_cache: bool = False) -> tuple[Any, torch.Tensor]:
        """Read prompts whose images have any number of tokens, with features that were computed before.

        Args:
            batch: left-padded and without answers. Tokens with an image index are image tokens.
            features_TD: what takes the places of the T image tokens, in their order.
            use_cache: whether the output has a cache.

        Returns:
            The model's output, with the logits of the last token only, and the attention [B, L] of the first tapped
            block.
        """
        self._begin_batch(batch)
        images_BL = batch.image_index >= 0

        def insert(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            embeddings_BLD = kwargs["inputs_embeds"].clone()
            embeddings_BLD[images_BL] = features_TD.to(embeddings_BLD.dtype)
            return args, kwargs | {"inputs_embeds": embeddings_BLD}

        hook = self.spec.language_model.register_forward_pre_hook(insert, with_kwargs=True)
        layout = forward_arguments(batch)
        try:
            with self._recording(batch, batch.rows):
                output = self.model(input_ids=batch.input_ids, logits_to_keep=1, use_cache=use_cache, **layout)
        finally:
            hook.remove()
        self._tokens = {}  # of the tapped blocks, which only losses need
        attention_BL = self.attention_captures[0].attention
        assert attention_BL is not None
        return output, attention_BL

    @property
    def layer(self) -> int:
        """The first tapped block."""
        return self.layers[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model's weights."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def end_tokens(self) -> list[int]:
        """Token ids that end an answer: those in the model's generation settings and those added by `end_with`."""
        own = self.model.generation_config.eos_token_id
        return [] if own is None else [own] if isinstance(own, int) else list(own)

    def end_with(self, token: int) -> None:
        """Add a token that ends answers."""
        self.model.generation_config.eos_token_id = sorted({*self.end_tokens, token})

    def trainable(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Return the trainable parameters with their names, by group.

        The groups are adapters, language_model, mixture, steering, projector and vision_tower. Empty groups are
        omitted.
        """
        parts = {id(p): "vision_tower" for p in self.spec.vision_tower.parameters()}
        parts |= {id(p): "projector" for p in self.spec.projector.parameters()}  # some are the end of the tower
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            part = name.split(".")[0]
            language = "adapters" if ".lora_" in name else "language_model"
            group = parts.get(id(parameter), language if part == "model" else part)
            groups.setdefault(group, []).append((name, parameter))
        return groups

    def _begin_batch(self, batch: Batch) -> None:
        self._cells, self._tokens, self._dummy_tokens = batch.cells, {}, None
        if self.mixture is not None:
            self.mixture.begin(batch.question_mask, batch.bounds() if batch.lengths else None, batch.attention_mask)

    def _rows(self, batch: Batch, tap: bool) -> torch.Tensor:
        return batch.rows if tap else torch.zeros_like(batch.rows)

    @contextmanager
    def _recording(self, batch: Batch, rows_BL: torch.Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for capture in self.attention_captures:
                stack.enter_context(capture.recording(rows_BL, batch.cells, batch.attention_mask))
            yield

    def _run_vision_tower_on_dummy(self, _decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the vision tower once for a batch without images, at the point where it runs for other batches.

        Under ZeRO-3 every rank must enter the same modules in the same order. The features are added with a weight of
        zero, so that a trainable projector is part of the graph on every rank.
        """
        if self._dummy is None:
            return None
        features_IND = self.spec.family.features(self.spec, self._dummy)
        self._dummy, self._dummy_tokens = None, features_IND[:, : self.spec.grid.size]
        embeddings = kwargs["inputs_embeds"]
        return args, kwargs | {"inputs_embeds": embeddings + 0 * self._dummy_tokens.sum().to(embeddings.dtype)}

    def _steer_block_input(self, place: int, _block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Steer the cells of the images at the input of a tapped block.

        The output of the block before is not always that input: some models add features of the image in between.
        """
        cells_BL = self._cells
        hidden_BLD = args[0] if args else kwargs["hidden_states"]
        # During generation, passes after the first one process single new tokens, which are not image tokens.
        if cells_BL is None or hidden_BLD.shape[1] != cells_BL.shape[1]:
            return None
        copies = hidden_BLD.shape[0] // cells_BL.shape[0]  # the beams of a sample are consecutive rows
        if self.steering is not None:
            steering = self.steering[place] if len(self.layers) > 1 else self.steering
            hidden_BLD = steering(hidden_BLD, cells_BL.repeat_interleave(copies, dim=0))
        self._tokens[self.layers[place]] = hidden_BLD[::copies]
        return ((hidden_BLD, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_BLD})

    def _collect(self, batch: Batch) -> list[TappedBlock]:
        """Return what the forward pass has left for each tapped block, and forget it."""
        tokens, dummy_IND = self._tokens, self._dummy_tokens
        self._tokens, self._dummy_tokens = {}, None
        images, count, found = len(batch.image_weight), self.spec.grid.size, []
        for layer, capture in zip(self.layers, self.attention_captures, strict=True):
            hidden_BLD, map_BL = tokens.get(layer), capture.attention
            capture.attention = None
            if hidden_BLD is None or map_BL is None:
                raise RuntimeError(
                    f"the attention of block {layer} was not captured: the model did not run the registered attention"
                )
            if dummy_IND is not None:
                # The weight is zero, but the outputs depend on the same tensors as for other batches: ZeRO-3 counts
                # the outputs that receive a gradient.
                nothing_IN = (0 * map_BL.sum()).expand(dummy_IND.shape[:2])
                found.append(TappedBlock(dummy_IND + 0 * hidden_BLD.sum(), nothing_IN))
            else:
                parts = (gather_images(values, batch.cells, images, count) for values in (hidden_BLD, map_BL))
                found.append(TappedBlock(*parts))
        return found


def require_layer(layer: int, spec: ModelSpec) -> None:
    """Check that block `layer` exists and has a block before it.

    Raises:
        ConfigError: it does not.
    """
    if not 1 <= layer < len(spec.blocks):
        raise ConfigError(
            f"student.layer is {layer}, but it must be between 1 and {len(spec.blocks) - 1}: the student's blocks have "
            f"indices 0 to {len(spec.blocks) - 1}, and block 0 has no block before it whose output could be steered"
        )


@torch.no_grad()
def check_causality(student: Student, batch: Batch) -> None:
    """Check that changing the last token of each sample changes no earlier logit, in that sample or in another one.

    Every rank must call it.

    Raises:
        RuntimeError: a logit changed, because the attention backend ignores the causal mask or the boundaries between
            the samples of a packed batch.
    """
    was_training = student.training
    student.eval()
    last_BL = _last_tokens(batch)
    one, other = [token for token in (10, 11, 12) if token != student.spec.image_token_id][:2]
    changed = torch.where(batch.input_ids == one, other, one).where(last_BL, batch.input_ids)
    before = replace(batch, labels=torch.where(batch.attention_mask, batch.input_ids, IGNORE))
    first, second = student(before, tap=False), student(replace(before, input_ids=changed), tap=False)
    earlier = (batch.attention_mask & ~last_BL)[:, first.kept]
    change = (first.logits - second.logits).abs().amax(-1)[earlier]
    student.train(was_training)
    if change.numel() and change.max() > 0:
        raise RuntimeError(f"a future token changed an earlier logit by {change.max():.2e}: attention is not causal")


def _last_tokens(batch: Batch) -> torch.Tensor:
    """Return a mask [B, L] bool that is True at the last valid token of each sample."""
    valid = batch.attention_mask.flatten()
    places = torch.arange(len(valid), device=valid.device) * valid
    last_S = places.new_zeros(len(batch.bounds()) - 1)
    last_S.scatter_reduce_(0, batch.sample_of_token().flatten(), places, "amax")
    return torch.zeros_like(valid).index_fill_(0, last_S, True).view_as(batch.attention_mask)
