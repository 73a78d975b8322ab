"""Rows of the attention loss as the original code selects them: after the image, up to the last ":"."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from medalign.contracts import Sample
from medalign.data.batches.collator import Collator
from medalign.errors import ConfigError
from medalign.geometry import PreprocessCfg
from tests.unit.data.tiny_text import TEMPLATE, encoder

VIEW = PreprocessCfg(12, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def collator(rows: str = "official", **changes) -> Collator:
    packed = changes.pop("packed", False)
    return Collator(encoder(**changes), VIEW, None, attention_rows=rows, packed=packed)


def sample(question: str, answer: str, images: int = 1) -> Sample:
    return Sample("k", "s", "vqa", question, answer, "open", (Image.new("RGB", (9, 9)),) * images)


def words(of: Collator, text: Sample) -> str:
    """The rows of a sample as words."""
    batch = of([text])
    assert batch.attention_rows is not None and batch.attention_rows is batch.rows
    return " ".join(of.encoder.tokenizer.convert_ids_to_tokens(batch.input_ids[batch.attention_rows].tolist()))


@pytest.mark.parametrize(
    ("question", "answer", "rows"),
    [
        ("is there a nodule ?", "yes", "is there a nodule ? ASSISTANT :"),
        ("zone : 1 ?", "no", "zone : 1 ? ASSISTANT :"),  # not the first colon
        ("is there a nodule ?", "nodule : yes", "is there a nodule ? ASSISTANT : nodule :"),
        ("lungs ?", "nodule : no effusion : some", "lungs ? ASSISTANT : nodule : no effusion :"),
    ],
)
@pytest.mark.parametrize("images", [1, 2])
def test_up_to_the_last_colon_of_prompt_and_answer(question, answer, rows, images):
    """The colon that the template writes before the image ("USER:") is ignored."""
    assert words(collator(), sample(question, answer, images)) == rows


def test_a_sample_without_an_image_has_none():
    assert words(collator(), sample("is there a nodule ?", "nodule : yes", images=0)) == ""


def test_an_answer_that_is_cut_before_its_colon_does_not_reach_it():
    whole = collator()([sample("a ?", "lungs clear : yes")]).input_ids.shape[1]
    assert words(collator(), sample("a ?", "lungs clear : yes")).endswith("lungs clear :")
    assert words(collator(max_length=whole - 3), sample("a ?", "lungs clear : yes")).endswith("ASSISTANT :")


def test_padded_and_packed_batches_have_the_rows_of_their_samples():
    texts = [sample("zone ?", "a : b"), sample("is there a nodule ?", "yes"), sample("a ?", "no", images=0)]
    singles = [collator()([text]).attention_rows[0] for text in texts]
    padded, packed = collator()(texts), collator(packed=True)(texts)
    for row, single in zip(padded.attention_rows, singles, strict=True):
        assert torch.equal(row[: len(single)], single) and not row[len(single) :].any()
    assert torch.equal(packed.attention_rows[0], torch.cat(singles))


def test_by_default_the_rows_are_those_of_the_prompt():
    batch = collator("prompt")([sample("zone ?", "a : b")])
    assert batch.attention_rows is None and batch.rows is batch.question_mask


def test_a_template_without_a_colon_after_the_image_is_refused():
    bare = TEMPLATE.replace(" ASSISTANT:", " ASSISTANT")
    with pytest.raises(ConfigError, match="losses.attention_rows is official, but .* writes no ':' after the image"):
        collator(template=bare)
    collator("prompt", template=bare)
