"""The form that every kind of vision tower fills in.

Shape suffixes: I images, T pixels per side, M patches, K tokens (the patches, and class or register tokens if there
are any), b the tower's width, H heads, h head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import nn
from typing_extensions import override

from medalign.config.schema.teacher import TeacherFeatures
from medalign.geometry import PatchGrid
from medalign.teacher.source import TeacherSource

FEATURES = get_args(TeacherFeatures)


class Streams(NamedTuple):
    """The residual stream around the last block: all from which features and attention are computed."""

    before: torch.Tensor  # [I, K, b]; all tokens that enter the last block
    after: torch.Tensor  # [I, M, b]; the patches that leave it


class Tower(nn.Module, ABC):
    """A vision tower. Each kind is a subclass in a file of its own, and has an entry in `towers.TOWERS`.

    Features are taken after the final norm by default: the bare residual stream may have a few channels far larger
    than the others, which would make every cosine between patches close to one. "before_norm" takes the stream, as the
    released code does.

    Args:
        grid: the tower's patches.
        width: b, number of features per patch.
        image_size: height and width of its input, in pixels.
        features: "after_norm" or "before_norm": whether features are taken after the final norm.

    Raises:
        ValueError: `features` is none of these.
    """

    has_attention: ClassVar[bool] = True  # whether the tower has a class token or a pooling head to distill from

    def __init__(self, grid: PatchGrid, width: int, image_size: int, features: str) -> None:
        super().__init__()
        if features not in FEATURES:
            raise ValueError(f'{type(self).__name__}: features="{features}" is none of {", ".join(FEATURES)}')
        self.grid = grid
        self.width = width
        self.image_size = image_size
        self.takes_features = features

    @staticmethod
    @abstractmethod
    def check(source: TeacherSource) -> int:
        """Check the source's configuration, before any weights are read.

        Returns:
            The height and width of the tower's input, in pixels.

        Raises:
            ConfigError: the tower is not supported; the message gives the file, the key and the remedy.
        """

    @classmethod
    def has_class_token(cls, source: TeacherSource) -> bool:
        """Return whether the towers of a source have a class token, before any weights are read."""
        return False

    @classmethod
    @abstractmethod
    def build(cls, source: TeacherSource, features: str) -> Tower:
        """Build the tower with random weights.

        Raises:
            ConfigError: no tower can be built from the configuration.
        """

    @classmethod
    @abstractmethod
    def load(cls, source: TeacherSource, features: str) -> Tower:
        """Build the tower with the source's weights.

        Raises:
            ConfigError: no tower can be built from the configuration.
            CheckpointError: the weights cannot be read, or do not fit the tower exactly.
        """

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> Streams:
        """Run the tower once on normalized pixels [I, 3, T, T]."""

    @abstractmethod
    def final_norm(self, patches: torch.Tensor) -> torch.Tensor:
        """Apply the norm after the last block to patches [I, M, b]."""

    @abstractmethod
    def attention(self, streams: Streams) -> torch.Tensor | None:
        """Compute how much the class token, or the pooling head, attends to each patch: float32 [I, M].

        None for a tower that has neither (`has_attention`).
        """

    def features(self, streams: Streams) -> torch.Tensor:
        """Select the patch features [I, M, b]."""
        return self.final_norm(streams.after) if self.takes_features == "after_norm" else streams.after


class ClassTokenTower(Tower):
    """A tower of transformer blocks whose first token is a class token; its attention is the target."""

    @classmethod
    @override
    def has_class_token(cls, source: TeacherSource) -> bool:
        return True

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the patches: the class token, and registers if there are any."""
        return 1

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Return the blocks; each is called with its tokens [I, K, b] as the first argument."""

    @abstractmethod
    def query_and_key(self, block: Any, tokens: torch.Tensor, queries: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Project the tokens that enter a block to the queries and keys of its attention.

        Args:
            block: one of `blocks`.
            tokens: [I, K, b].
            queries: number of tokens, from the first on, whose queries are returned; None is all.

        Returns:
            Queries [I, queries, H h] and keys [I, K, H h].
        """

    @property
    @abstractmethod
    def heads(self) -> int:
        """Heads of each block's attention, H."""

    @override
    def attention(self, streams: Streams) -> torch.Tensor:
        query, key = self.query_and_key(self.blocks()[-1], streams.before, 1)
        return query_attention(query[:, 0], key, self.heads)[:, self.prefix_tokens :]

    def block_attention(self, block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the attention matrix of a block, the mean over its heads, head by head: float32 [I, K, K]."""
        query, key = (each.unflatten(-1, (self.heads, -1)) for each in self.query_and_key(block, tokens, None))
        total = torch.zeros(len(tokens), tokens.shape[1], tokens.shape[1], device=tokens.device)
        for head in range(self.heads):
            scores = query[:, :, head].float() @ key[:, :, head].float().mT
            total += (scores * query.shape[-1] ** -0.5).softmax(dim=-1)
        return total / self.heads


class TextAlignedTower(Tower):
    """A tower that was trained together with a text tower, so that patches can be compared with texts."""

    @abstractmethod
    def attention(self, streams: Streams) -> torch.Tensor:
        """Compute how much the class token, or the pooling head, attends to each patch: float32 [I, M]."""

    @abstractmethod
    def values(self, streams: Streams) -> torch.Tensor:
        """Project patches on the value path of the last block into the space of texts: [I, M, e].

        Each patch goes through the block's attention as if it attended only to itself (see `conditioning`).
        """

    @classmethod
    @abstractmethod
    def embed_texts(cls, source: TeacherSource, texts: Sequence[str]) -> torch.Tensor:
        """Load the text tower, embed texts in the space of `values`, and free the tower: float32 [n, e].

        Raises:
            ConfigError: the source has no text tower or no tokenizer.
            CheckpointError: the text tower's weights cannot be read or do not fit.
        """


def query_attention(query: torch.Tensor, key: torch.Tensor, heads: int, scale: float | None = None) -> torch.Tensor:
    """Compute the attention of one query per image: one row of the softmax over all keys, in float32.

    The other rows of the attention matrix are not computed.

    Args:
        query: the projected query, [I, H h].
        key: the projected keys, [I, K, H h].
        heads: H.
        scale: factor of the scores; h ** -0.5 by default.

    Returns:
        Attention [I, K], the mean over the heads. Each row sums to 1.
    """
    query_IHh, key_IKHh = query.unflatten(-1, (heads, -1)).float(), key.unflatten(-1, (heads, -1)).float()
    scale = query_IHh.shape[-1] ** -0.5 if scale is None else scale
    scores_IHK = torch.einsum("ihc,ikhc->ihk", query_IHh, key_IKHh) * scale
    return scores_IHK.softmax(dim=-1).mean(dim=1)
