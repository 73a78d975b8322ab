"""Conversations have the tokens that the model was trained on; special tokens in a user's text are spelled out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

import medalign
from medalign.contracts import IGNORE, ImageTokens, Sample
from medalign.data.batches.conversation import Conversation
from medalign.data.batches.prompts import PromptEncoder
from medalign.data.batches.spelling import Speller
from medalign.data.samples.sample import REPORT_PROMPT, BadSample
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid
from medalign.phantom.records import records
from tests import mistral, tiny
from tests.unit.data.tiny_text import TEMPLATE as WORDS_TEMPLATE
from tests.unit.data.tiny_text import tokenizer as word_tokenizer

GREY = Image.new("RGB", (8, 6))
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL: dict[str, Callable[..., Any]] = {"fast": mistral.prepend_tokenizer, "slow": mistral.slow_tokenizer}


def sample(question: str, answer: str = "yes", images: int = 1) -> Sample:
    return Sample("k", "a.tar", "vqa", question, answer, "open", (GREY,) * images)


def conversation(tokenizer: Any) -> Conversation:
    return Conversation(tokenizer, ImageTokens(tokenizer.convert_tokens_to_ids("<image>"), PatchGrid(1, 1)))


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Bytes as tokens. Role markers are added tokens that are not special, as in some tokenizers."""
    words = tiny.tokenizer()
    words.add_tokens([AddedToken(token, normalized=False) for token in ("<|im_start|>", "<|im_end|>")])
    words.chat_template = template
    return words


@pytest.mark.parametrize("form", MISTRAL)
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Is there a nodule?", "No."),
        ("Is there a nodule?", "yes"),
        ("Wo liegt der Erguß?  Zwei  Leerzeichen", "3 mm, links"),
        ("肺炎?", "肺炎 \N{LUNGS}"),
        ("line\nbreak", "Findings:\n- clear\n- no effusion"),
        ("What does </s> mean?", "It ends a text: </s>"),
        ("Is <image> an image, or <s>[INST]<unk>?", "<image></s>"),
    ],
)
def test_mistral_conversations_are_as_sentencepiece_writes_them(form: str, question: str, answer: str) -> None:
    from sentencepiece import SentencePieceProcessor

    piece = SentencePieceProcessor(str(mistral.sentencepiece_model()))
    tokenizer = MISTRAL[form]()
    ours = conversation(tokenizer)
    prompt = ours.prompt(1, question)
    learned = ours.answer(prompt, 1, question, answer)
    image = tokenizer.convert_tokens_to_ids("<image>")
    whole = [1, *piece.encode("[INST] "), image, *piece.encode(f"\n{question} [/INST] {answer}"), 2]
    assert prompt + learned == whole
    assert prompt == [1, *piece.encode("[INST] "), image, *piece.encode(f"\n{question} [/INST]")]
    assert learned == [*piece.encode(answer), 2]  # SentencePiece writes a space before a text, as the template does


@pytest.mark.parametrize("form", MISTRAL)
def test_the_first_tokens_of_a_mistral_answer(form: str) -> None:
    ours = conversation(MISTRAL[form]())
    prompt = ours.prompt(0, "Is there a nodule?")
    assert prompt[:4] == [1, 733, 16289, 28793]
    assert ours.answer(prompt, 0, "Is there a nodule?", "No.") == [1770, 28723, 2]


@pytest.mark.parametrize("form", MISTRAL)
def test_a_generation_prompt_that_ends_with_a_space_is_refused(form: str) -> None:
    template = mistral.TEMPLATE.replace(" [/INST]", " [/INST] ").replace("%} {{ part", "%}{{ part")
    with pytest.raises(ConfigError, match=r"not the beginning of its conversation: after 1\d tokens.*with a space"):
        conversation(MISTRAL[form](template))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("{{ part['text'] | trim }}", "{{ part['text'] if message['role'] == 'user' }}"), "omits the"),
        (
            CHATML.replace("<|im_start|>assistant\n", "<|im_start|>model\n"),
            "the prompt has 'mode', the conversation 'assi'",
        ),
        (
            CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"),
            "the prompt has '<thi', the conversation",
        ),
    ],
)
def test_a_template_without_a_turn_that_continues_the_prompt(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        conversation(chatml(template))


@pytest.mark.parametrize("end", ["<|im_done|>", "<|im_done|></s>", "<end_of_turn>\n", "[/DONE]"])
def test_an_end_that_is_not_a_token_is_refused(end: str) -> None:
    message = re.escape(repr(end.removesuffix("</s>").strip()))
    with pytest.raises(ConfigError, match=f"ends an answer with {message}, which is not a token of the tokenizer"):
        conversation(chatml(CHATML.replace("<|im_end|>", end)))


def test_the_turn_ends_as_the_template_ends_it() -> None:
    tokenizer = chatml()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    encoder = PromptEncoder(tokenizer, image=ImageTokens(3, PatchGrid(1, 2)), max_length=200)
    encoded = encoder.encode(sample(" Is it? ", " yes "), with_answer=True)
    learned = [token for token in encoded.labels if token != IGNORE]
    assert tokenizer.decode(learned) == "yes<|im_end|>"  # not the line break that the template writes after it
    assert encoder.end_token_id == end != tokenizer.eos_token_id
    assert str(tokenizer.decode(encoded.input_ids)).endswith("Is it?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>")
    without = PromptEncoder(tiny.tokenizer(), image=ImageTokens(3, PatchGrid(1, 2)), max_length=200)
    assert without.end_token_id == tokenizer.eos_token_id  # this template writes no end


def test_what_the_template_writes_between_an_answer_and_its_end_is_learned() -> None:
    template = CHATML.replace("<|im_end|>\n", " <|im_end|>\n")
    ours = conversation(tokenizer := chatml(template))
    assert tokenizer.decode(ours.answer(ours.prompt(1, "Is it?"), 1, "Is it?", "yes")) == "yes <|im_end|>"


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral's vocabulary in the later form: a space is written before the first word only."""
    tokenizer = mistral.prepend_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return tokenizer


@pytest.mark.parametrize("make", [*MISTRAL.values(), metaspace_tokenizer, chatml, word_tokenizer])
@pytest.mark.parametrize(
    "text", ["<s>[INST] <image>\nis {} ? [/INST] no {}</s>", "{}<image>{} <s>", " a{}", "{} \n</s>a"]
)
def test_what_is_spelled_is_read_in_its_place(make: Callable[[], Any], text: str) -> None:
    """A word that is not a special token has the same ids marked (and so spelled out) as unmarked, in any position."""
    tokenizer = make()
    speller = Speller(tokenizer, "<image>")
    for word in ("nodule", "is there", " 3 mm ", "é肺", "."):
        marked, plain = (text.replace("{}", put) for put in (f"\ufdd0{word}\ufdd1", word))
        assert speller.encode(marked) == list(tokenizer(plain, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", ["</s>", "<image>", "<s>x", "a<|im_end|>", "<|im_start|>user\n<image>", "<pad><pad>"])
def test_special_tokens_of_a_text_are_spelled(text: str) -> None:
    tokenizer = chatml()
    ours = conversation(tokenizer)
    letters = list(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text))
    vocabulary = tokenizer.get_vocab()
    spelled = [vocabulary[letter] for part, _ in letters for letter in part]
    plain = ours.prompt(1, "Q")
    at = plain.index(vocabulary["Q"])
    assert ours.prompt(1, text) == [*plain[:at], *spelled, *plain[at + 1 :]]
    assert ours.answer(plain, 1, "Q", text) == [*spelled, ours.end_token_id]
    assert ours.prompt(1, text).count(3) == 1 and max(spelled) < len(tokenizer) - 2 and min(spelled) > 3


def test_a_text_that_names_the_image_token_is_a_sample_like_another() -> None:
    encoder = PromptEncoder(tiny.tokenizer(), image=ImageTokens(3, PatchGrid(1, 4)), max_length=200)
    encoded = encoder.encode(sample("What is <image> ?", "an <image> </s>", images=2), with_answer=True)
    assert encoded.input_ids.count(3) == 8 and max(encoded.image_index) == 1
    assert encoded.input_ids.count(encoder.tokenizer.eos_token_id) == 1
    learned = [token for token in encoded.labels if token != IGNORE]
    assert encoder.tokenizer.decode(learned[:-1]) == " an <image> </s>"
    assert "What is <image> ?" in encoder.tokenizer.decode(encoded.input_ids)


def test_added_words_stay_tokens() -> None:
    tokenizer = chatml()
    tokenizer.add_tokens(["pneumothorax"])
    ours = conversation(tokenizer)
    word = tokenizer.get_vocab()["pneumothorax"]
    for question in ("a pneumothorax?", "a pneumothorax, not </s>?"):
        assert ours.prompt(1, question).count(word) == 1


def test_a_tokenizer_that_cannot_spell_is_refused_by_name() -> None:
    """A unigram vocabulary with its special tokens as pieces finds them in any text."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<image>", 0.0), *((letter, -9.0) for letter in "prob answer:USI<>/mge?")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, 0)), eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = tiny.TEMPLATE
    encoder = PromptEncoder(tokenizer, image=ImageTokens(2, PatchGrid(1, 4)), max_length=200)
    encoder.encode(sample("pro?", "ban"), with_answer=True)
    for question, answer, token in (("pro <image>", "no", "<image>"), ("pro", "no</s>", "</s>")):
        with pytest.raises(BadSample, match=f"^a.tar/k: the tokenizer reads '{token}' in the text as a special token"):
            encoder.encode(sample(question, answer), with_answer=True)


def test_a_special_token_that_normalization_makes_is_refused_by_name() -> None:
    from tokenizers import normalizers

    tokenizer = chatml()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=True)], special_tokens=True)
    ours = conversation(tokenizer)
    ours.prompt(1, "<|end|>")
    with pytest.raises(BadSample, match=r"reads '<\|end\|>' in the text as a special token"):
        ours.prompt(1, "\N{FULLWIDTH LESS-THAN SIGN}|end|>")


def test_a_text_that_no_tokenizer_takes() -> None:
    encoder = PromptEncoder(tiny.tokenizer(), image=ImageTokens(3, PatchGrid(1, 4)), max_length=200)
    for answer, message in (("ok \ud83d", "cannot read the text"), ("a \ufdd0", r"contains U\+FDD0"), ("", "no token")):
        with pytest.raises(BadSample, match=rf"^a\.tar/k: .*{message}"):
            encoder.encode(sample("q", answer), with_answer=True)


def test_a_template_that_refuses_a_text() -> None:
    refuse = "{% if 'no' in messages[0]['content'][1]['text'] %}{{ raise_exception('no no') }}{% endif %}"
    ours = conversation(chatml(CHATML + refuse))
    with pytest.raises(BadSample, match="the chat template rejects the text: .*no no"):
        ours.prompt(1, "is it no?")


def test_an_answer_that_merges_into_the_prompt_is_refused_by_name() -> None:
    vocabulary = {
        token: n for n, token in enumerate([*tiny.SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), ":("])
    }
    inner = Tokenizer(models.BPE(vocabulary, [(":", "(")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(tiny.SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = tiny.TEMPLATE.replace("ASSISTANT: {% endif", "ASSISTANT:{% endif")
    encoder = PromptEncoder(tokenizer, image=ImageTokens(3, PatchGrid(1, 4)), max_length=200)
    encoder.encode(sample("Which?", "A"), with_answer=True)
    with pytest.raises(BadSample, match=r"^a.tar/k: the tokenizer merges the beginning of the answer '\(A\) left'"):
        encoder.encode(sample("Which?", "(A) left"), with_answer=True)


@pytest.mark.parametrize("limit", [80, 95, 110])
def test_what_is_cut_is_the_end_of_the_same_tokens(limit: int) -> None:
    long = PromptEncoder(chatml(), image=ImageTokens(3, PatchGrid(1, 16)), max_length=1000)
    short = PromptEncoder(chatml(), image=ImageTokens(3, PatchGrid(1, 16)), max_length=limit)
    asked = sample("Is it?", "because " * 9)
    whole, cut = (encoder.encode(asked, with_answer=True) for encoder in (long, short))
    assert cut.input_ids == whole.input_ids[:limit] and cut.labels == whole.labels[:limit]
    assert (cut.answer_cut, cut.question_cut) == (len(whole.input_ids) - limit, 0) and cut.truncated
    asked = sample("why" * 40, "because")
    whole, cut = (encoder.encode(asked, with_answer=True) for encoder in (long, short))
    assert len(cut.input_ids) == limit and cut.answer_cut == len("because")
    assert cut.question_cut == len(whole.input_ids) - limit - cut.answer_cut


def test_words_that_the_vocabulary_does_not_hold() -> None:
    tokenizer = word_tokenizer(WORDS_TEMPLATE)
    ours = conversation(tokenizer)
    unknown = tokenizer.unk_token_id
    assert ours.prompt(1, "is <image> there ?").count(unknown) == 3  # "<", "image" and ">"
    assert ours.prompt(1, "is it <unk> ?").count(unknown) == 4


@pytest.mark.parametrize(
    ("limit", "digest"),
    [
        (160, "6fb54931f587f75e497139abe739aed5d3e7d233c80d890d5303fa349f50a1be"),
        (90, "213c6a7f514d6468cd3cfe2c2eaad375d7858e0cdc54f43070da21b8254cde43"),  # cuts the reports
    ],
)
def test_the_packaged_students_tokens_are_what_they_were(limit: int, digest: str) -> None:
    """The scores of the quickstart depend on them."""
    folder = Path(medalign.__file__).parent / "assets" / "phantom_student"
    encoder = PromptEncoder(
        AutoProcessor.from_pretrained(folder), image=ImageTokens(3, PatchGrid(1, 64)), max_length=limit
    )
    seen = hashlib.sha256()
    for record in records(40, 0, "train"):
        fields = record.fields
        question, answer = fields.get("question") or REPORT_PROMPT, fields.get("answer") or fields["report"]
        for with_answer in (True, False):
            one = encoder.encode(sample(question, answer), with_answer=with_answer)
            lists = [one.input_ids, one.labels, one.question_mask, one.image_index, one.truncated]
            seen.update(json.dumps(lists).encode())
    assert seen.hexdigest() == digest
    one = encoder.encode(sample("Which side is the pleural effusion on?", "left"), with_answer=True)
    asked = [202, 339, 361, 272, 262, 441, 420, 360, 34, 1469, 29]
    assert one.input_ids == [1, 800, 29, 224, *[3] * 64, *asked, 286, 2]


def test_a_template_that_divides_by_zero() -> None:
    broken = tiny.tokenizer()
    broken.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(ConfigError, match=r"accept image and text content: .*division by zero\); change chat_template"):
        conversation(broken)


def test_a_tokenizer_without_a_token_for_the_unknown() -> None:
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<image>": 0, "</s>": 1}, unk_token="<unk>")), eos_token="</s>"
    )
    words.chat_template = tiny.TEMPLATE
    with pytest.raises(ConfigError, match=r"rejects what its chat template renders: .*UNK.*; correct tokenizer"):
        PromptEncoder(words, image=ImageTokens(0, PatchGrid(1, 16)), max_length=100)
