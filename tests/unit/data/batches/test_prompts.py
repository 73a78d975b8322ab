"""Labels, question masks, and truncation of samples that are too long."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor, tokenization_utils_base

from medalign.contracts import IGNORE, ImageTokens, Sample
from medalign.data.batches.collator import Collator
from medalign.data.batches.prompts import Encoded, PromptEncoder
from medalign.data.samples.sample import BadSample
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid, PreprocessCfg
from tests import tiny
from tests.unit.data.tiny_text import TEMPLATE, WORDS, encoder, tokenizer

GREY = Image.new("RGB", (8, 6))


def sample(question: str = "is there a nodule ?", answer: str = "yes", images: int = 1) -> Sample:
    return Sample("k", "train/shard-000000.tar", "vqa", question, answer, "closed", (GREY,) * images)


def words(enc: PromptEncoder, encoded: Encoded, mask: list[bool]) -> str:
    return " ".join(enc.tokenizer.convert_ids_to_tokens([t for t, m in zip(encoded.input_ids, mask, strict=True) if m]))


def test_spans_and_labels() -> None:
    enc = encoder()
    got = enc.encode(sample(answer="lungs clear"), with_answer=True)
    length = len(got.input_ids)
    assert words(enc, got, [True] * length).split() == [
        *["<s>", "USER", ":", *["<image>"] * 9, "is", "there", "a", "nodule", "?", "ASSISTANT", ":"],
        *["lungs", "clear", "</s>"],
    ]
    assert words(enc, got, got.question_mask) == "is there a nodule ? ASSISTANT :"
    assert words(enc, got, [label != IGNORE for label in got.labels]) == "lungs clear </s>"
    assert all(label in (IGNORE, token) for label, token in zip(got.labels, got.input_ids, strict=True))
    assert got.image_index == [-1] * 3 + [0] * 9 + [-1] * 10
    assert not got.truncated


def test_without_answer_the_prompt_is_the_same() -> None:
    enc = encoder()
    long, short = (enc.encode(sample(), with_answer=flag) for flag in (True, False))
    assert long.input_ids[: len(short.input_ids)] == short.input_ids
    assert set(short.labels) == {IGNORE}
    assert words(enc, short, short.question_mask).endswith("ASSISTANT :")


@pytest.mark.parametrize("bos", [True, False])
def test_prompt_equals_the_models_own_processor(bos: bool) -> None:
    side = {"height": 42, "width": 42}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=side, crop_size=side),
        tokenizer(template=None, bos=bos),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    enc = PromptEncoder(processor, image=ImageTokens(image, PatchGrid(1, 9)), max_length=64)
    content = [{"type": "image", "image": GREY}, {"type": "text", "text": "is there a nodule ?"}]
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert enc.encode(sample(), with_answer=False).input_ids == theirs["input_ids"][0]


def test_the_text_around_an_image_and_its_companions() -> None:
    """The template writes a marker, the model expects tokens around the image, and not every image token is a cell."""
    tokenizer_ = tokenizer(TEMPLATE.replace("<image>", "<marker>"))
    tokenizer_.add_special_tokens({"additional_special_tokens": ["<image>", "<marker>", "<begin>", "<end>"]})
    cells = (False, True, True, False)
    image = ImageTokens(
        tokenizer_.convert_tokens_to_ids("<image>"), PatchGrid(1, 2), cells, "<marker>", "<begin><image><end>"
    )
    enc = PromptEncoder(tokenizer_, image=image, max_length=64, max_images=2)
    got = enc.encode(sample("is there a zone ?", images=2), with_answer=True)
    assert words(enc, got, [True] * len(got.input_ids)).split() == [
        *["<s>", "USER", ":", *["<begin>", *["<image>"] * 4, "<end>"] * 2],
        *["is", "there", "a", "zone", "?", "ASSISTANT", ":", "yes", "</s>"],
    ]
    assert got.image_index == [*[-1] * 4, *[0] * 4, -1, -1, *[1] * 4, *[-1] * 10]
    assert got.cells == [*[False] * 4, *cells, False, False, *cells, *[False] * 10]
    written = enc.encode(sample("is <marker> a zone ?", images=2), with_answer=True)
    assert written.input_ids.count(image.token_id) == 8  # the marker in the question is text
    batch = Collator(enc, PreprocessCfg(12, (0.5,) * 3, (0.5,) * 3), None)([sample(images=2)])
    assert batch.cells.sum() == 4 and (batch.image_index >= 0).sum() == 8


def test_several_images_and_none() -> None:
    enc = encoder()
    two = enc.encode(sample(images=2), with_answer=True)
    assert [two.image_index.count(i) for i in (0, 1)] == [9, 9]
    assert two.image_index.index(0) < two.image_index.index(1)
    assert words(enc, two, two.question_mask) == "is there a nodule ? ASSISTANT :"
    none = enc.encode(sample(images=0), with_answer=True)
    assert set(none.image_index) == {-1}
    assert not any(none.question_mask)


@settings(max_examples=60, deadline=None)
@given(limit=st.integers(16, 60), question=st.integers(1, 40), answer=st.integers(1, 40), with_answer=st.booleans())
def test_length_limit(limit: int, question: int, answer: int, with_answer: bool) -> None:
    enc = encoder(max_length=limit)
    given_sample = sample(" ".join(["zone"] * question), " ".join(["clear"] * answer))
    got = enc.encode(given_sample, with_answer=with_answer)
    fixed = 3 + 9 + 2  # <s> USER : images ASSISTANT :
    supervised = [label for label in got.labels if label != IGNORE]
    kept = words(enc, got, got.question_mask).split().count("zone")
    assert len(got.input_ids) == min(limit, fixed + question + (answer + 1 if with_answer else 0))
    assert got.image_index.count(0) == 9
    assert words(enc, got, got.question_mask).endswith("ASSISTANT :")
    assert got.truncated == (kept < question or (with_answer and len(supervised) < answer + 1))
    if with_answer:
        assert supervised
        assert kept == question or len(supervised) == 1  # the question is cut only when the answer cannot be


def test_a_text_longer_than_the_model_takes_is_cut_without_its_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    enc = PromptEncoder(tiny.tokenizer(), image=ImageTokens(3, PatchGrid(1, 16)), max_length=100)
    enc.tokenizer.model_max_length = 100
    warned: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda text, *_: warned.append(text))
    got = enc.encode(sample("why ? " * 1000, "because " * 1000), with_answer=True)
    assert got.truncated and len(got.input_ids) == 100 and not warned
    enc.tokenizer("why ? " * 1000)
    assert "indexing errors" in warned[0]  # what is silent above is not silent elsewhere


def test_limit_too_small_for_the_images() -> None:
    with pytest.raises(ConfigError, match=r"max_length is 14.*take 14"):
        encoder(max_length=14)
    with pytest.raises(ConfigError, match=r"max_length is 20.*2 images with 9"):
        encoder(max_length=20).encode(sample(images=2), with_answer=True)


def test_the_largest_sample_must_fit_the_template_and_the_limit() -> None:
    with pytest.raises(ConfigError, match=r"max_length is 32, but the template and the 3 images .* take 32; raise it"):
        encoder(max_length=32, max_images=3)
    fits = encoder(max_length=33, max_images=3).encode(sample(images=3), with_answer=True)
    assert fits.image_index.count(2) == 9
    once = TEMPLATE.replace("'<image>\\n'", "'<image>\\n' if loop.first else ''")
    with pytest.raises(ConfigError, match="renders 1 image tokens for a sample with 3 images"):
        encoder(template=once, max_images=3)


def test_beginning_of_sequence_comes_once() -> None:
    for changes in ({}, {"template": "<s>" + TEMPLATE}, {"template": "<s>" + TEMPLATE, "bos": False}):
        enc = encoder(**changes)
        assert enc.encode(sample(), with_answer=True).input_ids.count(enc.tokenizer.bos_token_id) == 1
    enc = encoder(bos=False)
    assert enc.tokenizer.bos_token_id not in enc.encode(sample(), with_answer=True).input_ids


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template; add chat_template.jinja"),
        (TEMPLATE.replace("<image>", "<image><image>"), r"2 \(it is already expanded\)"),
        (TEMPLATE.replace("<image>", ""), "it renders none"),
        ("{{ 'USER: ' + messages[0]['content'] }}", "does not accept image and text content"),
        ("{{ 'USER: <image>' }}", "no question after the image"),
    ],
)
def test_template_that_does_not_fit(template: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(template=template)


def test_text_that_cannot_be_used() -> None:
    enc = encoder()
    name = r"train/shard-000000\.tar/k: "
    with pytest.raises(BadSample, match=name + "answer '' has no token"):
        enc.encode(sample(answer=""), with_answer=True)
    assert enc.encode(sample(answer=""), with_answer=False).input_ids


def test_padding_token_falls_back_to_the_end_token() -> None:
    assert encoder().pad_token_id == 0
    assert encoder(pad=None).pad_token_id == tokenizer().eos_token_id
    assert len(set(WORDS)) == len(WORDS)


def test_an_answer_begins_as_the_template_writes_it() -> None:
    """Answers are tokenized as the template writes them: here with a leading space in the first token."""
    words = tiny.tokenizer()
    encode = PromptEncoder(words, image=ImageTokens(3, PatchGrid(1, 2)), max_length=200)
    encoded = encode.encode(sample(question="Is it?", answer="yes"), with_answer=True)
    supervised = [token for token in encoded.labels if token != IGNORE]
    assert words.decode(supervised[:-1]) == " yes" and supervised[-1] == words.eos_token_id
    without = encode.encode(sample(question="Is it?", answer="yes"), with_answer=False)
    assert encoded.input_ids[: len(without.input_ids)] == without.input_ids
