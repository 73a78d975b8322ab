"""Interventions on attention against formulas on small tensors, and what they leave as it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from medalign.decoding.interventions import AmplifiedImage, RecordedHeads, RecordedRow
from medalign.student import capture

SCALING = 0.3


def tensors(rows: int, passed: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of 4 heads, keys and values of 2."""
    draw = torch.Generator().manual_seed(passed)
    return tuple(
        torch.randn(rows, heads, length, 8, generator=draw) for heads, length in ((4, passed), (2, keys), (2, keys))
    )


def scores_of(query, key, head: int, softcap: float | None) -> list[float]:
    """Scores of the last row of one sample and head."""
    scores = [float(query[head, -1] @ key[head // 2, column]) * SCALING for column in range(key.shape[1])]
    return scores if softcap is None else [softcap * math.tanh(score / softcap) for score in scores]


def mean_of(value, head: int, scores: dict[int, float]) -> torch.Tensor:
    """The output of a head for these scores of its visible columns."""
    total = sum(map(math.exp, scores.values()))
    return sum(math.exp(score) / total * value[head // 2, column] for column, score in scores.items())


def backend(module, query, key, value, mask, **kwargs):
    return torch.zeros(len(query), query.shape[2], query.shape[1], 8), None


def masks(form: str, visible: torch.Tensor, passed: int) -> torch.Tensor | None:
    """The mask of a backend for the last row; the rows before are not used."""
    if form == "flash":
        return visible.long()
    mask = visible[:, None, None].expand(-1, 1, passed, -1)
    return mask if form == "sdpa" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_image_is_amplified_in_the_last_row(form, softcap):
    """A prompt of 5 tokens and one more, padding in the second sample; the sums have another order than here."""
    image = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]).bool()
    amplified = AmplifiedImage(image, 0.5, new_tokens=3)
    for passed, keys in ((5, 5), (1, 6)):
        query, key, value = tensors(2, passed, keys)
        visible = torch.ones(2, keys, dtype=torch.bool)
        visible[1, 0] = False
        mask = masks(form, visible, passed)
        output, _ = amplified(backend, nn.Identity(), query, key, value, mask, scaling=SCALING, softcap=softcap)
        assert output.shape == (2, passed, 4, 8) and (output[:, :-1] == 0).all()
        for row in range(2):
            for head in range(4):
                scores = dict(enumerate(scores_of(query[row], key[row], head, softcap)))
                for column in image[row].nonzero().flatten().tolist():
                    scores[column] += 0.5 * abs(scores[column])
                scores = {column: score for column, score in scores.items() if visible[row, column]}
                torch.testing.assert_close(output[row, -1, head], mean_of(value[row], head, scores))


@pytest.mark.parametrize("form", ["cache", "flash"])
def test_a_window_hides_the_first_columns(form):
    """A cache with a window keeps the last keys; flash-attention gets all keys and the window."""
    image = torch.tensor([[0, 1, 1, 0, 0]]).bool()
    amplified = AmplifiedImage(image, 0.5, new_tokens=3)
    query, key, value = tensors(1, 5, 5)
    amplified(backend, nn.Identity(), query, key, value, None, scaling=SCALING)
    query, key, value = tensors(1, 1, 6)
    kept = key[:, :, 2:], value[:, :, 2:]
    if form == "cache":
        output, _ = amplified(backend, nn.Identity(), query, *kept, None, scaling=SCALING)
    else:
        output, _ = amplified(backend, nn.Identity(), query, key, value, None, scaling=SCALING, sliding_window=4)
    for head in range(4):
        scores = dict(enumerate(scores_of(query[0], kept[0][0], head, None)))
        scores[0] += 0.5 * abs(scores[0])  # column 2 of the prompt
        torch.testing.assert_close(output[0, -1, head], mean_of(kept[1][0], head, scores))


def test_beams_share_the_image_of_their_sample():
    image = torch.tensor([[1, 1, 0], [0, 1, 0]]).bool()
    query, key, value = (part.repeat_interleave(2, 0) for part in tensors(2, 3, 3))
    beams, _ = AmplifiedImage(image, 0.5, 0)(backend, nn.Identity(), query, key, value, None)
    alone, _ = AmplifiedImage(image, 0.5, 0)(backend, nn.Identity(), query[::2], key[::2], value[::2], None)
    torch.testing.assert_close(beams, alone.repeat_interleave(2, 0))


def test_the_recorded_row_is_that_of_the_softmax():
    query, key, value = tensors(1, 3, 3)
    record = RecordedRow()
    output, _ = record(backend, nn.Identity(), query, key, value, None, scaling=SCALING)
    assert (output == 0).all()
    for head in range(4):
        expected = torch.tensor(scores_of(query[0], key[0], head, None)).softmax(0)
        torch.testing.assert_close(record.weights_RHK[0, head], expected)


def test_the_heads_of_the_first_pass_are_recorded():
    record, outputs = RecordedHeads(), torch.randn(2, 3, 4, 8)
    for factor in (1, 2):
        assert record(lambda *_, f=factor: (f * outputs, None), nn.Identity())[0].equal(factor * outputs)
    assert record.last_BHD.equal(outputs[:, -1])


def test_modules_have_an_intervention_only_inside_the_context():
    touched, other = nn.Identity(), nn.Identity()
    with pytest.raises(ZeroDivisionError), capture.intervening({touched: RecordedRow()}):
        assert hasattr(touched, capture._INTERVENTION) and not hasattr(other, capture._INTERVENTION)
        raise ZeroDivisionError
    assert not hasattr(touched, capture._INTERVENTION)
