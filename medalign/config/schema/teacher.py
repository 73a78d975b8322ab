"""The teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medalign.config.value_types import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, Precision

TeacherFeatures = Literal["after_norm", "before_norm"]
TeacherAttention = Literal["last_block", "rollout"]


@dataclass
class TeacherSettings:
    """What a frozen teacher is, and what is taken from it."""

    path: str = ""
    """Folder with open_clip_config.json and its weights, folder of a vision model of transformers,
    open_clip:ARCHITECTURE/FILE, biovil:FILE, or pmc_clip:FILE."""
    mean: tuple[ClosedUnitInterval, ClosedUnitInterval, ClosedUnitInterval] | None = None
    """Mean of red, green and blue that the teacher was trained with, for pixels from 0 to 1. null: that of its folder;
    open_clip:ARCHITECTURE/FILE has none."""
    std: tuple[ClosedUnitInterval, ClosedUnitInterval, ClosedUnitInterval] | None = None
    """Standard deviation of red, green and blue, as teacher.mean."""
    random_weights_seed: int | None = None
    """A control experiment: replace the trained weights by random ones from this seed."""
    features: TeacherFeatures = "after_norm"
    """Patch features of the last block: after the tower's final norm, or before it, as in the released code."""
    attention: TeacherAttention = "last_block"
    """The attention target. last_block: the row of the class token, or of the pooling head, in the last block. rollout:
    the class token's row of the product of all blocks' attention, for towers with a class token."""
    precision: Precision = "auto"
    """Precision of the teacher's weights and activations. auto: that of the student. Targets are always fp32."""
    compile: bool = False
    """Compile the teacher's tower with torch.compile. It costs a minute or so at the start and whenever a micro-batch
    has a new number of images."""
    channels_last: bool = False
    """Keep images and the weights of convolutions in the order of torch.channels_last, in which a tower of convolutions
    may run faster. Transformers have one convolution and gain nothing."""
    text_weight: ClosedUnitInterval = 0.0
    """Share of a text-conditioned map in the attention target of each question that names a finding of the lexicon. 0:
    only the class token's attention (the paper's), the same for every question about an image."""
    text_temperature: PositiveFloat = 0.05
    """Temperature of the softmax that turns the patches' relevance for a finding into the text-conditioned map."""
    text_absent_weight: ClosedUnitInterval = 0.0
    """Weight of the prompts where the finding is absent, which are subtracted from those where it is present."""
    text_reports: bool = False
    """Whether samples that ask for a report also get the text-conditioned map, of the findings that their report states
    as present."""
    mask_sinks: NonNegativeFloat = 0.0
    """Patches whose norm after the last block is larger than this multiple of the image's median get no attention, such
    as 3; 0 is off. Large towers have a few such patches, often of the background, that hold much of the attention."""
    cache: str = ""
    """Folder of targets made by `medalign targets`, which are read instead of running the tower. Empty: none."""
    lexicon: str = ""
    """YAML file with the findings that a question can name, and their prompts. Empty: the packaged one, for chest
    radiographs."""
    similarity_weight: NonNegativeFloat = 1.0
    """Factor of losses.alpha for this teacher."""
    attention_weight: NonNegativeFloat = 1.0
    """Factor of losses.beta for this teacher; 0 for one that has no attention."""


@dataclass
class FurtherTeacher(TeacherSettings):
    """One of several teachers, beside the first."""

    name: str = ""
    """Its losses are logged as similarity_NAME and attention_NAME. Empty: its number, from 2."""


@dataclass
class TeacherConfig(TeacherSettings):
    """The frozen medical CLIP."""

    also: list[FurtherTeacher] = field(default_factory=list)
    """Further teachers at the same time: a list of sections with the settings of this one, and a name. Each has its own
    losses, which are added."""
