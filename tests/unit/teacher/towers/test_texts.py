"""Prompts are embedded as the models themselves embed them."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import medalign
from medalign.errors import CheckpointError, ConfigError
from medalign.teacher.loading import load_teacher
from medalign.teacher.source import CONFIG_NAME, WEIGHTS_NAME, find_teacher
from medalign.teacher.towers import tower_class
from medalign.teacher.towers.open_clip_vit import build_clip
from tests.unit.teacher.towers.cases import CASES, MEAN, STD, clip_model, siglip_model, write_transformers

PHANTOM = Path(medalign.__file__).parent / "assets" / "phantom_teacher"
TEXTS = ["There is a small nodule in the left upper zone.", "No nodule."]
WORDS = ["[PAD]", "[UNK]", "There", "is", "a", "nodule", "No", "small", "[END]"]


def embedded(path: Path | str) -> torch.Tensor:
    source = find_teacher(path, MEAN, STD)
    with torch.no_grad():
        return tower_class(source).embed_texts(source, TEXTS)


@pytest.mark.parametrize("own_prefix", [False, True])
@torch.no_grad()
def test_open_clip_with_a_vocabulary_of_its_own(tmp_path, own_prefix):
    config = json.loads((PHANTOM / CONFIG_NAME).read_text())["model_cfg"]
    model, state = build_clip(config).eval(), load_file(PHANTOM / WEIGHTS_NAME)
    model.load_state_dict(state)
    ids = [encoding.ids for encoding in Tokenizer.from_file(str(PHANTOM / "tokenizer.json")).encode_batch(TEXTS)]
    for name in (CONFIG_NAME, "tokenizer.json"):
        (tmp_path / name).write_bytes((PHANTOM / name).read_bytes())
    flat = [key for key in state if not key.startswith(("visual.", "logit_scale"))]
    save_file(
        {f"text.{key}" if own_prefix and key in flat else key: state[key] for key in state}, tmp_path / WEIGHTS_NAME
    )
    torch.testing.assert_close(embedded(tmp_path), model.encode_text(torch.tensor(ids)))


@torch.no_grad()
def test_open_clip_with_openais_vocabulary(tmp_path):
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    ids = open_clip.SimpleTokenizer()(TEXTS)
    torch.testing.assert_close(embedded(f"open_clip:ViT-S-32-alt/{tmp_path / 'weights.pt'}"), model.encode_text(ids))


def write_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


@pytest.mark.parametrize(("build", "padding"), [(clip_model, True), (siglip_model, "max_length")])
@torch.no_grad()
def test_transformers(tmp_path, build, padding):
    model = build()
    model.config.text_config.eos_token_id = len(WORDS) - 1
    write_transformers(tmp_path, model)
    write_tokenizer(tmp_path)
    length = model.config.text_config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer(TEXTS, padding=padding, max_length=length, truncation=True, return_tensors="pt")
    kept = tokens if padding is True else {"input_ids": tokens["input_ids"]}  # SigLIP attends to its padding
    torch.testing.assert_close(embedded(tmp_path), model.get_text_features(**kept).pooler_output)


def test_a_teacher_without_texts_cannot_follow_a_question(tmp_path):
    dino, vision = (next(case for case in CASES if key in case.name) for key in ("DINOv2", "CLIP vision model"))
    dino.write(tmp_path / "dino")
    with pytest.raises(ConfigError, match=r"trained without texts, but teacher\.text_weight is 0\.5; set it to 0"):
        load_teacher(tmp_path / "dino", text_weight=0.5)
    vision.write(tmp_path / "vision")
    with pytest.raises(ConfigError, match="a clip_vision_model has no text tower"):
        load_teacher(tmp_path / "vision", text_weight=0.5)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / name).write_bytes((PHANTOM / name).read_bytes())
    with pytest.raises(ConfigError, match=r"its vocabulary has 56 words, but .*tokenizer\.json cannot be read"):
        load_teacher(tmp_path, text_weight=1.0)
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.json has 9 words, but text_cfg\.vocab_size is 56"):
        load_teacher(tmp_path, text_weight=1.0)


def test_missing_weights_of_the_text_tower_are_listed(tmp_path):
    for name in (CONFIG_NAME, "tokenizer.json"):
        (tmp_path / name).write_bytes((PHANTOM / name).read_bytes())
    state = load_file(PHANTOM / WEIGHTS_NAME)
    del state["ln_final.bias"]
    save_file(state, tmp_path / WEIGHTS_NAME)
    load_teacher(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 missing: ln_final\.bias"):
        load_teacher(tmp_path, text_weight=1.0)


def test_a_text_tower_that_would_be_downloaded_is_refused(tmp_path):
    (tmp_path / WEIGHTS_NAME).write_bytes((PHANTOM / WEIGHTS_NAME).read_bytes())
    config = json.loads((PHANTOM / CONFIG_NAME).read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "microsoft/some-bert"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"its text tower is microsoft/some-bert; supported"):
        load_teacher(tmp_path, text_weight=1.0)
