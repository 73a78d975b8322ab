"""Folders in the layout of LLaVA's authors: the ids of their own code, and what cannot be read, with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionModel, LlavaProcessor

from medalign.checkpoint import export
from medalign.config import StudentConfig
from medalign.contracts import IGNORE, Sample
from medalign.data.batches.prompts import PromptEncoder
from medalign.errors import ConfigError
from medalign.student.checks import check_student
from medalign.student.families.registry import find_family
from medalign.student.loading import load_processor, load_student
from medalign.student.tokenizers import reserve_image_token
from tests import mistral
from tests.unit.student.families import authors

CONVERSATIONS = [
    ("Is the heart enlarged?", "No.", 1),
    ("What differs between the two films?", "The left effusion is new: 3.5 cm, ≈ 40 %.", 2),
    ("Define\natelectasis", "Collapse of lung tissue ☃", 0),
]


def encoder(config: StudentConfig) -> PromptEncoder:
    spec, processor = check_student(config)
    return PromptEncoder(processor, image=spec.image, max_length=1000, max_images=2)


def sample(question: str, answer: str, images: int) -> Sample:
    return Sample("k", "shard", "vqa", question, answer, "open", (Image.new("L", (8, 8)),) * images)


@pytest.fixture(scope="module")
def llava_med(tmp_path_factory: pytest.TempPathFactory) -> StudentConfig:
    folder = authors.save_llava_med(tmp_path_factory.mktemp("authors") / "llava_med")
    return StudentConfig(path=str(folder), layer=2, vision_tower=f"{folder}/{authors.TOWER}")


@pytest.mark.parametrize(("question", "answer", "images"), CONVERSATIONS)
def test_llava_med_has_the_ids_of_its_authors(llava_med, question: str, answer: str, images: int) -> None:
    """Their code cuts the text at "<image>" and tokenizes each piece by SentencePiece."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(mistral.sentencepiece_model()))
    encode = encoder(llava_med)
    text = "<image>\n" * images + question
    image = [encode.image.token_id] * encode.image.count

    def theirs(words: str) -> list[int]:
        first, *others = (pieces.encode(part) for part in words.split("<image>"))
        return [1, *first, *(token for part in others for token in [*image, *part])]

    got = encode.encode(sample(question, answer, images), with_answer=True)
    assert got.input_ids == [*theirs(f"[INST] {text} [/INST] {answer} "), 2]
    asked = theirs(f"[INST] {text} [/INST]")
    assert [label != IGNORE for label in got.labels].index(True) == len(asked)
    assert got.input_ids[-2:] == [28705, 2]  # the space before the end
    assert encode.encode(sample(question, answer, images), with_answer=False).input_ids == asked


@pytest.mark.parametrize(("question", "answer", "images"), CONVERSATIONS)
def test_llava_llama_has_the_ids_of_its_authors(tmp_path: Path, question: str, answer: str, images: int) -> None:
    """The prompt of Vicuna v1, cut at "<image>" in the same way."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(mistral.sentencepiece_model()))
    encode = encoder(StudentConfig(path=str(authors.save_llava_llama(tmp_path / "llava")), layer=2))
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    text = f"{system} USER: " + "<image>\n" * images + f"{question} ASSISTANT: {answer}"
    first, *others = (pieces.encode(part) for part in text.split("<image>"))
    image = [encode.image.token_id] * encode.image.count
    expected = [1, *first, *(token for part in others for token in [*image, *part]), 2]
    assert encode.encode(sample(question, answer, images), with_answer=True).input_ids == expected


def test_the_image_token_of_llava_med_needs_no_row(llava_med) -> None:
    """Mistral's tokenizer writes bytes for unknown characters, so its unknown token is free."""
    encode = encoder(llava_med)
    assert encode.image.token_id == 0 and len(encode.tokenizer) == 32000
    got = encode.encode(sample("What is <unk>, or <image>?", "<unk>", 1), with_answer=True)
    assert got.input_ids.count(0) == encode.image.count


@pytest.mark.parametrize(("question", "answer", "images"), CONVERSATIONS)
def test_huatuo_has_the_prompt_of_its_authors(tmp_path, question: str, answer: str, images: int) -> None:
    encode = encoder(StudentConfig(path=str(authors.save_huatuo(tmp_path / "huatuo")), layer=2))
    got = encode.encode(sample(question, answer, images), with_answer=True)
    text = encode.tokenizer.decode(got.input_ids).replace("<image>" * encode.image.count, "<image>")
    written = "<image>\n" * images
    assert text == f"<|user|>\n{written}{question}\n<|assistant|>\n{answer}<|endoftext|>"
    taught = [token for token in got.labels if token != IGNORE]
    assert encode.tokenizer.decode(taught) == f"{answer}<|endoftext|>"
    assert encode.image.token_id == 259 and encode.tokenizer.convert_ids_to_tokens(259) == "<image>"


def test_an_answer_ends_where_generation_stops(tmp_path: Path) -> None:
    """The tokenizer of Qwen2's chat models ends a turn with another token than config.json says."""
    folder = authors.save_huatuo(tmp_path / "huatuo")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    encode = encoder(StudentConfig(path=str(folder), layer=2))
    assert encode.tokenizer.convert_ids_to_tokens(encode.end_token_id) == "<|endoftext|>"


TYPED = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Q: {% else %}A: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
PRINTED = "{% for message in messages %}{{ message['role'] + ': ' }}{{ message['content'] | trim }}{% endfor %}"
TEXT = (  # leaves out what is not text
    "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
)
TEMPLATES = {  # file -> template, and whether it is used
    "tokenizer takes images": ("tokenizer_config.json", TYPED, True),
    "tokenizer takes text": ("tokenizer_config.json", authors.CHATML, False),
    "tokenizer prints the list": ("tokenizer_config.json", PRINTED, False),
    "tokenizer omits images": ("tokenizer_config.json", TEXT, False),
    "jinja": ("chat_template.jinja", TYPED, True),
    "jinja that takes text": ("chat_template.jinja", PRINTED, True),  # the user's: the prompts refuse it by name
    "json": ("chat_template.json", TYPED, True),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_of_the_folder_is_used_if_it_is_for_images(tmp_path: Path, case: str) -> None:
    """The tokenizer's template is often that of the language model below, whose prompt the student never saw."""
    name, template, used = TEMPLATES[case]
    path = authors.save_huatuo(tmp_path / "huatuo") / name
    if path.suffix == ".jinja":
        path.write_text(template)
    else:
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | {"chat_template": template}))
    processor = load_processor(StudentConfig(path=str(path.parent), layer=2))
    processor.save_pretrained(tmp_path / "saved")
    again = LlavaProcessor.from_pretrained(tmp_path / "saved")
    assert processor.chat_template == again.chat_template == again.tokenizer.chat_template
    assert (processor.chat_template == template) == used
    assert used or processor.chat_template.startswith("{% for message in messages %}{% if message['role'] == 'user'")


def test_a_chat_template_json_without_a_template_is_named(tmp_path: Path) -> None:
    folder = authors.save_huatuo(tmp_path / "huatuo")
    (folder / "chat_template.json").write_text("{}")
    with pytest.raises(ConfigError, match=r'chat_template.json has no text "chat_template"; correct or remove it'):
        load_processor(StudentConfig(path=str(folder), layer=2))


def edited(folder: Path, **changes: Any) -> StudentConfig:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    return StudentConfig(path=str(folder), layer=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; .* only with 'mlp2x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres', whose images take a varying number"),
        ({"mm_vision_tower": None}, "does not name its vision tower"),
        (
            {"mm_vision_tower": "google/siglip-base"},
            "names the vision tower google/siglip-base, .*student.vision_tower",
        ),
        ({"vocab_size": 259}, "its embedding has 259 rows, all of which its tokenizer uses"),
        ({"model_type": "llava"}, r"its embedding|tokenizer.model is missing"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = edited(authors.save_huatuo(tmp_path / "huatuo"), **changes)
    with pytest.raises(ConfigError, match=message) as refused:
        check_student(config)
    assert "\n" not in str(refused.value)


def test_a_flat_configuration_is_not_taken_for_that_of_transformers(tmp_path: Path) -> None:
    """LLaVA 1.0 says `llava`; transformers would build 7 billion random weights for it."""
    flat = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_use_im_start_end": True}
    family = find_family(tmp_path, flat)
    assert family.model_type == "llava_llama"
    with pytest.raises(ConfigError, match="mm_projector_type is 'linear'"):
        family.check(tmp_path, flat)


@pytest.mark.parametrize("kind", ["llava_llama", "llava"])
def test_the_tower_may_have_the_name_of_the_training_argument(tmp_path: Path, kind: str) -> None:
    """The authors' code takes `vision_tower` where `mm_vision_tower` is absent."""
    folder = authors.save_llava_llama(tmp_path / "llava")
    values = json.loads((folder / "config.json").read_text())
    values |= {"vision_tower": values.pop("mm_vision_tower"), "model_type": kind}
    (folder / "config.json").write_text(json.dumps(values))
    spec, _ = check_student(StudentConfig(path=str(folder), layer=2))
    assert spec.image_size == 32


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_tower_that_is_named_must_be_described(llava_med: StudentConfig, tmp_path: Path, name: str) -> None:
    for path in Path(llava_med.vision_tower).iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=rf"student.vision_tower {re.escape(str(tmp_path))} .*{name}"):
        check_student(StudentConfig(path=llava_med.path, layer=2, vision_tower=str(tmp_path)))


def test_an_unknown_token_that_occurs_is_not_an_image_token(tmp_path: Path) -> None:
    from tests.unit.data.tiny_text import tokenizer

    words = tokenizer()
    image = words.convert_tokens_to_ids("<image>")
    with pytest.raises(ConfigError, match="none for the image token"):
        reserve_image_token(words, image, tmp_path)
    assert reserve_image_token(words, image + 1, tmp_path) == image


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_a_tower_in_a_folder_of_its_own_is_exported_with_its_weights(
    tmp_path: Path, trained: bool, weights: str
) -> None:
    """The authors' code of HuatuoGPT-Vision reads the tower from there."""
    base = authors.save_huatuo(tmp_path / "huatuo")
    if weights == "model.safetensors":  # of another tower than the student has
        (base / authors.TOWER / "pytorch_model.bin").unlink()
        CLIPVisionModel(authors.VISION).save_pretrained(base / authors.TOWER)
    config = StudentConfig(path=str(base), layer=2, train_vision_tower=trained, steering=False)
    student = load_student(config, torch.float32)
    torch.nn.init.normal_(student.spec.vision_tower.embeddings.class_embedding if trained else torch.empty(0))
    whole = {name: value.detach() for named in student.trainable().values() for name, value in named}
    export.write_export(student, whole, config, 1000, tmp_path / "export")
    export.merge(tmp_path / "export", tmp_path / "merged", authors_layout=True)
    place = tmp_path / "merged" / authors.TOWER
    assert {path.name for path in place.iterdir()} == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert all(name.startswith("vision_model.") for name in load_file(place / "model.safetensors"))
    tower, found = CLIPVisionModel.from_pretrained(place, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    expected = student.spec.vision_tower.state_dict()
    state = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("name", ["../outside", "{root}/outside", "."])
def test_a_tower_outside_the_folder_is_not_written(tmp_path: Path, name: str) -> None:
    """The names in config.json are the user's; no file of theirs is replaced."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.safetensors").write_bytes(b"theirs")
    base = authors.save_huatuo(tmp_path / "huatuo")
    edited(base, mm_vision_tower=name.format(root=tmp_path))
    config = StudentConfig(path=str(base), layer=2, steering=False, vision_tower=f"{base}/{authors.TOWER}")
    student = load_student(config, torch.float32)
    whole = {name: value.detach() for named in student.trainable().values() for name, value in named}
    export.write_export(student, whole, config, 1000, tmp_path / "export")
    export.merge(tmp_path / "export", tmp_path / "merged", authors_layout=True)
    assert [path.read_bytes() for path in outside.iterdir()] == [b"theirs"]
    assert "lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")
