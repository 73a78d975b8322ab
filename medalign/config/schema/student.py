"""The student and its adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medalign.config.value_types import FiniteFloat, HalfOpenUnitInterval, PositiveInt

AttentionBackend = Literal["auto", "sdpa", "flash_attention_2", "eager"]
QueryMixtureForm = Literal["beside_lora", "official"]
StudentTraining = Literal["lora", "full"]
Quantization = Literal["none", "nf4"]


@dataclass
class LoraConfig:
    """Low-rank adapters on linear layers of the student's language model."""

    rank: PositiveInt = 32
    """Rank r."""
    alpha: PositiveInt = 16
    """The adapter's output is multiplied by alpha / r."""
    dropout: HalfOpenUnitInterval = 0.0
    """Dropout before the adapter."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(r) instead (rsLoRA), so that a larger rank does not make the adapter weaker."""
    dora: bool = False
    """Train the norm of each output of an adapted layer apart from its direction (DoRA). It costs memory and time."""
    targets: str = ""
    """Regular expression of the names inside a block of the layers that get an adapter, such as "self_attn" or
    "(q|v)_proj". Empty: all linear layers."""


@dataclass
class StudentConfig:
    """The vision-language model that is trained."""

    path: str = ""
    """Local folder of a vision-language model, as it is published."""
    image_size: PositiveInt | None = None
    """Pixels per side of the square image, for students that take images of any size. null: as the family says (672
    for Qwen2.5-VL and 768 for Qwen3-VL, which gives 24 x 24 image tokens). Other students have one size."""
    vision_tower: str = ""
    """Folder of the vision tower's config.json and preprocessor_config.json, for a student in the layout of LLaVA's
    authors whose tower is neither in its folder nor known (CLIP ViT-L/14). Weights are read from the student only."""
    layer: PositiveInt | list[PositiveInt] = 20
    """The tapped decoder block l, counted from 0: its input is aligned with the teacher's features, its attention with
    the teacher's attention. At least 1, because block l needs one before it. A list taps several blocks, each with its
    own W; the first one's attention is reported."""
    steering: bool = True
    """Attach the learnable matrix W to the image tokens that enter block l."""
    steering_rank: PositiveInt | None = None
    """Rank of W as a product of two factors. null: a full matrix."""
    epsilon: FiniteFloat = 1.0
    """Strength of the steering: X + epsilon X W^T."""
    query_mixture: bool = False
    """Attach the query-adaptive mixture of LoRA experts to the query projection of block l, the first one of a list."""
    query_mixture_form: QueryMixtureForm = "beside_lora"
    """beside_lora: the projection keeps its LoRA. official, as in the released code: it has none, and the experts have
    LoRA's initial weights and dropout. The router reads the last question token in both: the released one reads the
    token after the last ":", which is the answer's first in training and does not exist yet in generation."""
    train: StudentTraining = "lora"
    """What is trained in the language model. lora: adapters. full: all of its weights, embeddings and output layer
    included, at train.lr; student.lora has no effect then."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters."""
    train_projector: bool = False
    """Train the projector between vision tower and language model too."""
    train_vision_tower: bool = False
    """Train the vision tower too, as far as the image tokens depend on it."""
    quantization: Quantization = "none"
    """nf4: the linear layers of the language model are read in 4 bits (QLoRA), which needs bitsandbytes, student.train
    lora, and a ZeRO stage below 3."""
    attention: AttentionBackend = "auto"
    """Attention of every block. auto: flash_attention_2 if flash-attn and a GPU are available, else sdpa."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory, all except the tapped ones."""

    def __post_init__(self) -> None:
        if isinstance(self.layer, list) and len(self.layer) == 1:  # [20] is 20, also in files and comparisons
            self.layer = self.layer[0]

    @property
    def layers(self) -> tuple[int, ...]:
        """The tapped blocks as a tuple."""
        return (self.layer,) if isinstance(self.layer, int) else tuple(self.layer)
