"""Loss terms of two arms, named in `losses.extra`: true boxes as the target, and targets with permuted patches.

I images, N image tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

import torch

from medalign.config import Config
from medalign.contracts import Batch, LossValue, StudentOutput, TeacherTargets
from medalign.data.shards.index import ShardIndex
from medalign.geometry import CanvasFrame, PatchGrid, coverage
from medalign.losses import LossTerm
from medalign.losses.attention import AttentionTerm, attention_kl, image_weights
from medalign.losses.token_similarity import SimilarityTerm
from medalign.pipeline import check_collator


class BoxAttentionTerm(LossTerm):
    """The attention loss with the boxes of the question as the target, each point in them equally likely.

    Args:
        coefficient: factor of the term.
        maps: key of a sample -> the fraction of each patch that its boxes cover, [N]. Samples without boxes are missing
            and do not count.
    """

    def __init__(self, coefficient: float, maps: Mapping[str, torch.Tensor]) -> None:
        super().__init__("box_attention", coefficient)
        self.maps = maps

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the number of images whose sample has boxes and rows of the attention loss."""
        return self._weights(batch).sum()

    def compute(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossValue | None:
        """Return the divergence from the boxes, summed over the images that count."""
        if output.attention is None:
            return None
        empty = torch.zeros(output.attention.shape[1])
        target_IN = torch.stack([self.maps.get(key, empty) for key in _keys(batch)]).to(output.attention.device)
        weight_I = self._weights(batch)
        return LossValue(sum=(attention_kl(output.attention, target_IN) * weight_I).sum(), count=weight_I.sum())

    def _weights(self, batch: Batch) -> torch.Tensor:
        boxed = torch.tensor([key in self.maps for key in _keys(batch)], device=batch.image_weight.device)
        return image_weights(batch) * boxed


class ShuffledTerm(LossTerm):
    """A term of the package whose targets have their patches permuted, each sample by its own permutation.

    The permutation is the same in every epoch and for all terms, so the targets stay those of one image.
    """

    def __init__(self, term: LossTerm) -> None:
        super().__init__(f"shuffled_{term.name}", term.coefficient)
        self.term = term

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the count of the term."""
        return self.term.count(batch)

    def compute(self, output: StudentOutput, targets: TeacherTargets | None, batch: Batch) -> LossValue | None:
        """Return the term's value for the permuted targets."""
        return self.term.compute(output, None if targets is None else permuted(targets, batch), batch)


def permuted(targets: TeacherTargets, batch: Batch) -> TeacherTargets:
    """Permute the patches of each image's targets by a permutation that its sample's key determines."""
    patches = targets.features.shape[1]
    orders = [torch.randperm(patches, generator=_generator(key)) for key in _keys(batch)]
    order_IN = torch.stack(orders).to(targets.features.device)
    attention = None if targets.attention is None else targets.attention.gather(1, order_IN)
    features = targets.features.gather(1, order_IN[..., None].expand_as(targets.features))
    return replace(targets, features=features, attention=attention)


def box_attention(config: Config) -> BoxAttentionTerm:
    """Build the term of arm X for `losses.extra`."""
    collator, _ = check_collator(config, None, max_images=1)
    return BoxAttentionTerm(1.0, box_maps(ShardIndex.open(config.data.folders), collator.grid))


def shuffled_similarity(_config: Config) -> ShuffledTerm:
    """Build the spatial term of arm S for `losses.extra`."""
    return ShuffledTerm(SimilarityTerm(1.0))


def shuffled_attention(_config: Config) -> ShuffledTerm:
    """Build the attention term of arm S for `losses.extra`."""
    return ShuffledTerm(AttentionTerm(1.0))


def box_maps(index: ShardIndex, grid: PatchGrid) -> dict[str, torch.Tensor]:
    """Return the map of each sample with boxes, by key: the fraction of each patch that they cover, float32 [N]."""
    maps = {}
    for place in range(len(index)):
        sample = index.read(place)
        if sample.boxes:
            frame = CanvasFrame(*sample.images[0].size)
            maps[sample.key] = torch.from_numpy(coverage([frame.to_unit(box) for box in sample.boxes], grid)).float()
    return maps


def _keys(batch: Batch) -> list[str]:
    """The key of each image's sample; "" for the dummy image of a batch without images."""
    return [batch.keys[sample] if batch.keys else "" for sample in batch.image_sample.tolist()]


def _generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))
