"""The study's own loss terms: true boxes as the target, and targets with permuted patches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medalign import phantom
from medalign.contracts import StudentOutput, TeacherTargets
from medalign.data.shards.index import ShardIndex
from medalign.evaluation.grounding import grounding
from medalign.geometry import CanvasFrame, PatchGrid
from medalign.losses import AttentionTerm, SimilarityTerm
from tests import tiny
from tools.study.terms import BoxAttentionTerm, ShuffledTerm, box_maps, permuted


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    phantom.write_phantoms(folder, 1, 6, 0, reports=0.5)
    return folder


def test_box_maps_are_the_boxes_on_the_grid(films: Path) -> None:
    index, grid = ShardIndex.open(films / "val"), PatchGrid(8, 8)
    maps = box_maps(index, grid)
    samples = [index.read(place) for place in range(len(index))]
    assert maps.keys() == {sample.key for sample in samples if sample.boxes} != {sample.key for sample in samples}
    for sample in samples:
        if sample.boxes:
            frame = CanvasFrame(*sample.images[0].size)
            assert grounding(maps[sample.key], sample.boxes, frame, grid).inside > 0.6  # patches at an edge are partial


def test_attention_to_the_true_box() -> None:
    batch = tiny.batch(texts=((5, 4),) * 3)
    batch.keys = ("boxed", "empty", "other")
    maps = {"boxed": torch.tensor([0.0, 1.0, 0.5, 0.0]), "other": torch.tensor([1.0, 0.0, 0.0, 0.0])}
    term = BoxAttentionTerm(1.0, maps)
    assert term.count(batch) == 2
    attention = torch.tensor([[0.0, 0.2, 0.1, 0.0], [0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0]], requires_grad=True)
    value = term.compute(_output(attention), None, batch)
    assert value.count == 2
    assert float(value.sum.detach()) == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-6)
    value.sum.backward()
    assert (attention.grad[1] == 0).all()  # a question without boxes
    assert attention.grad[2, 0] < 0 < attention.grad[2, 1]
    assert term.compute(_output(None), None, batch) is None


def test_patches_are_permuted_alike_for_both_losses_and_by_sample() -> None:
    batch = tiny.batch()
    batch.keys = ("a", "b")
    features, attention = torch.randn(2, 4, 3), torch.rand(2, 4)
    features[..., 0] = attention  # follows the patch
    targets = TeacherTargets(features, attention)
    found = permuted(targets, batch)
    assert torch.equal(found.features[..., 0], found.attention)
    assert torch.equal(found.attention.sort(1).values, attention.sort(1).values)
    assert not torch.equal(found.attention, attention)
    assert torch.equal(permuted(targets, batch).attention, found.attention)  # in every epoch
    batch.keys = ("b", "a")
    same = TeacherTargets(features[:1].expand(2, -1, -1), attention[:1].expand(2, -1))
    one, other = permuted(same, batch).attention
    assert not torch.equal(one, other)
    assert permuted(TeacherTargets(features, None), batch).attention is None


def test_a_shuffled_term_is_the_term_of_shuffled_targets() -> None:
    batch = tiny.batch()
    batch.keys = ("a", "b")
    targets = TeacherTargets(torch.randn(2, 4, 3), torch.rand(2, 4))
    output = _output(torch.rand(2, 4))._replace(tokens=torch.randn(2, 4, 5))
    for term in (SimilarityTerm(1.0), AttentionTerm(1.0)):
        shuffled = ShuffledTerm(term)
        assert (shuffled.name, shuffled.coefficient) == (f"shuffled_{term.name}", 1.0)
        assert shuffled.count(batch) == term.count(batch)
        found = shuffled.compute(output, targets, batch).sum
        assert found == term.compute(output, permuted(targets, batch), batch).sum
        assert found != term.compute(output, targets, batch).sum
        assert shuffled.compute(output, None, batch) is None


def _output(attention: torch.Tensor | None) -> StudentOutput:
    return StudentOutput(torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.long), None, attention)
