"""The form of a model family: how its folder is read, where its parts are, and how an image reaches it.

A family is one small subclass of `Family`, in a module of its own. No other module refers to the names of a model's
attributes or inputs.

Shape suffixes: B samples, L tokens, I images, S pixels per side, N image tokens per image, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from medalign.config import StudentConfig
from medalign.contracts import Batch, ImageTokens
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid, PreprocessCfg
from medalign.student.tokenizers import is_bare_sentencepiece, sentencepiece_tokenizer


@dataclass(frozen=True)
class ModelSpec:
    """References to the parts of a model, and the properties of its images."""

    family: Family
    model: Any  # the transformers model itself, without adapters around it
    blocks: Sequence[nn.Module]  # decoder blocks, in order
    attentions: Sequence[Any]  # the attention module of each block
    language_model: nn.Module
    vision_tower: nn.Module
    projector: nn.Module
    decoder: str  # qualified name of the language model inside the model
    width: int  # d, hidden size of the language model
    image: ImageTokens
    image_size: int  # input resolution of the vision tower, pixels per side

    @property
    def image_token_id(self) -> int:
        """Token id that represents an image."""
        return self.image.token_id

    @property
    def grid(self) -> PatchGrid:
        """Grid of the image's cells."""
        return self.image.grid

    def window(self, block: int) -> int | None:
        """Tokens that the attention of a block covers; None if it covers all."""
        language: Any = self.language_model.config
        kinds = getattr(language, "layer_types", None) or ["sliding_attention"] * len(self.blocks)
        return getattr(language, "sliding_window", None) if kinds[block] == "sliding_attention" else None

    def query_projection(self, block: int) -> tuple[nn.Linear, int]:
        """Return the linear layer that computes the queries of a block, and how many of its first outputs are queries.

        Raises:
            ConfigError: there is no such layer.
        """
        attention = self.attentions[block]
        if hasattr(attention, "q_proj"):
            return attention.q_proj, attention.q_proj.out_features
        if hasattr(attention, "qkv_proj"):  # queries, keys and values in one, in this order
            return attention.qkv_proj, attention.o_proj.in_features
        names = [name for name, module in attention.named_modules() if isinstance(module, nn.Linear)]
        raise ConfigError(
            f"student.query_mixture needs a query projection (q_proj or qkv_proj), but the attention of block {block} "
            f"has {' and '.join(names)}; set student.query_mixture to false"
        )

    def preprocess_cfg(self, processor: Any) -> PreprocessCfg:
        """How the vision tower takes its pixels; the normalization is that of the model's own processor."""
        return self.family.preprocess_cfg(processor, self.image_size)


class PatchAttention(NamedTuple):
    """Where the attention between patches is computed.

    Attributes:
        projections: those of queries and keys of each block up to the image's features, in order.
        heads: number of heads.
        first: number of the tokens before the patches.
    """

    projections: Sequence[tuple[nn.Linear, nn.Linear]]
    heads: int
    first: int


class Family:
    """One kind of model. Subclasses name it and override what differs from the usual form of transformers.

    Attributes:
        model_type: `model_type` in config.json.
        model_class: the class of transformers that reads the folder.
        key_mapping: patterns of weight names in the files, and what they are replaced by; None if the names are those
            of transformers.
        no_packing: why samples cannot be packed in one row; empty if they can.
        no_flash: why flash-attention, which takes no mask, cannot compute the model's attention; empty if it can.
        max_images: largest number of images in a sample; None if any is.
        features_remedy: what helps if the vision tower returns the wrong number of features.
        runs_without_data: whether the vision tower runs on the meta device, where no tensor has values.
        decoder: qualified name of the language model inside the model.
    """

    model_type: ClassVar[str]
    model_class: ClassVar[Any] = AutoModelForImageTextToText
    key_mapping: ClassVar[Mapping[str, str] | None] = None
    no_packing: ClassVar[str] = ""
    no_flash: ClassVar[str] = ""
    max_images: ClassVar[int | None] = None
    features_remedy: ClassVar[str] = "correct config.json"
    runs_without_data: ClassVar[bool] = True
    decoder: ClassVar[str] = "model.language_model"

    # The folder

    def claims(self, values: Mapping[str, Any]) -> bool:
        """Whether a folder with these values in config.json is of this family."""
        return values.get("model_type") == self.model_type

    def check(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Check config.json before any library reads it. Raises ConfigError for what cannot be used."""

    def config(self, folder: Path, settings: StudentConfig) -> Any:
        """Return the configuration for `model_class`. `settings` are the user's."""
        return AutoConfig.from_pretrained(folder, local_files_only=True)

    def processor(self, folder: Path, settings: StudentConfig) -> Any:
        """Return the processor: tokenizer, image settings, and chat template."""
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        if is_bare_sentencepiece(folder):
            processor.tokenizer = sentencepiece_tokenizer(folder)
        return processor

    # The parts of a loaded model

    def inspect(self, model: Any) -> ModelSpec:
        """Return the spec of a model.

        Raises:
            ConfigError: the model cannot be a student.
        """
        language = model.model.language_model
        blocks = getattr(language, "layers", ())
        if not blocks or not all(hasattr(block, "self_attn") for block in blocks):
            raise ConfigError(
                f"the student's language model ({language.config.model_type}) is not a stack of blocks with one "
                "self-attention each; choose a student whose language model is, such as Llama, Mistral or Qwen2"
            )
        return ModelSpec(
            family=self,
            model=model,
            blocks=blocks,
            attentions=[block.self_attn for block in blocks],
            language_model=language,
            vision_tower=self.vision_tower(model),
            projector=self.projector(model),
            decoder=self.decoder,
            width=language.config.hidden_size,
            image=self.image(model.config),
            image_size=self.image_size(model.config),
        )

    def vision_tower(self, model: Any) -> nn.Module:
        """Return the vision tower."""
        tower: nn.Module = model.model.vision_tower
        return tower

    def projector(self, model: Any) -> nn.Module:
        """Return what lies between vision tower and language model."""
        projector: nn.Module = model.model.multi_modal_projector
        return projector

    def image(self, config: Any) -> ImageTokens:
        """Return how an image is written in a prompt. Raises ConfigError if `config` does not describe a grid."""
        raise NotImplementedError

    def image_size(self, config: Any) -> int:
        """Return the input resolution of the vision tower in pixels per side."""
        size: int = config.vision_config.image_size
        return size

    # The inputs

    def preprocess_cfg(self, processor: Any, image_size: int) -> PreprocessCfg:
        """Return how the vision tower takes its pixels."""
        image = processor.image_processor  # its colors are checked when it is loaded
        resample = Image.Resampling(getattr(image, "resample", None) or Image.Resampling.BICUBIC)
        return PreprocessCfg(image_size, tuple(image.image_mean), tuple(image.image_std), resample)

    def inputs(self, spec: ModelSpec, batch: Batch, pixels: torch.Tensor | None) -> dict[str, Any]:
        """Return the model's inputs beside token ids and attention mask, for a forward pass and for generation.

        Args:
            spec: the model.
            batch: padded or packed.
            pixels: [I, 3, S, S]; None for a batch without images.
        """
        return {} if pixels is None else {"pixel_values": pixels}  # generation also looks at a None

    def positions(self, spec: ModelSpec, batch: Batch, positions_BL: torch.Tensor) -> torch.Tensor:
        """Return the `position_ids` of a forward pass.

        Args:
            spec: the model.
            batch: padded or packed.
            positions_BL: place of each token in its sample, int64.
        """
        return positions_BL

    def features(self, spec: ModelSpec, pixels: torch.Tensor) -> torch.Tensor:
        """Run the vision tower and the projector as a forward pass does, [I, 3, S, S] to [I, N, D]."""
        return torch.stack(tuple(spec.model.get_image_features(pixel_values=pixels).pooler_output))

    def blank(self, arguments: dict[str, Any], blanked_BL: torch.Tensor) -> dict[str, Any]:
        """Return the arguments of the language model with zeros in the place of some image tokens.

        Args:
            arguments: the keyword arguments of a pass over whole prompts.
            blanked_BL: True at the image tokens to replace.
        """
        embeddings_BLD = arguments["inputs_embeds"]
        return arguments | {"inputs_embeds": embeddings_BLD.masked_fill(blanked_BL[..., None], 0)}

    def class_attention(self, spec: ModelSpec, block: int) -> tuple[nn.Linear, nn.Linear, int]:
        """Return where a block of the vision tower computes the attention of its class token to the image's patches.

        Args:
            spec: the model.
            block: index of the block; negative from the end.

        Returns:
            The projections of queries and keys, whose first token is the class token, and the number of heads.

        Raises:
            LookupError: the patches with the class token are not the image tokens; the message says why.
        """
        raise LookupError("its vision tower has no class token, or merges patches to image tokens")

    def patch_attention(self, spec: ModelSpec) -> PatchAttention:
        """Return where the vision tower computes the attention between the image's patches.

        Args:
            spec: the model.

        Raises:
            LookupError: image tokens are not patches, or images have one size only; the message says why.
        """
        raise LookupError("its image tokens are not the patches of its vision tower")

    def scaled_features(self, spec: ModelSpec, pixels: torch.Tensor, scales: int) -> Iterator[torch.Tensor]:
        """Yield the features of images at several scales, [I, N, D] each; the last ones are the cells of the grid.

        Each scale has twice as many tokens per side as the one before.

        Args:
            spec: a model for which `patch_attention` exists.
            pixels: [I, 3, S, S].
            scales: number of scales; the side of the grid is a multiple of 2 ** (scales - 1).
        """
        raise NotImplementedError

    def features_settings(self, config: Any) -> str:
        """Describe the settings that the features depend on, for error messages."""
        return "its config.json"
