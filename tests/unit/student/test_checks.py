"""A student that cannot be trained is rejected before its weights are read, with the reason and the remedy."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    JambaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    SiglipVisionConfig,
)

from medalign.config import StudentConfig
from medalign.errors import ConfigError
from medalign.student.checks import check_student
from medalign.student.loading import load_processor, load_student
from tests import mistral, tiny

Edit = Callable[[Path], None]


def config(folder: Path, **changes: Any) -> StudentConfig:
    return StudentConfig(**{"path": str(folder), "layer": 1, **changes})


def edited(name: str, **changes: Any) -> Edit:
    """Change values of a JSON file. `vision__patch_size` is a key in vision_config; None removes a key."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        for key, value in changes.items():
            section, _, inner = key.rpartition("__")
            owner = values[f"{section}_config"] if section else values
            owner.pop(inner, None) if value is None else owner.update({inner: value})
        (folder / name).write_text(json.dumps(values))

    return edit


def weights(change: Callable[[dict[str, Any]], None]) -> Edit:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def without(part: str) -> Edit:
    def drop(state: dict[str, Any]) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return weights(drop)


def written(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text) and None


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_foreign(state: dict[str, Any]) -> None:
    state["vision_tower.expert.weight"] = torch.zeros(2)


def with_old_buffers(state: dict[str, Any]) -> None:
    """Buffers that older versions of transformers saved."""
    state["vision_tower.embeddings.position_ids"] = torch.arange(17)[None]
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def shortened_head(state: dict[str, Any]) -> None:
    name = next(name for name in state if "lm_head" in name)
    state[name] = state[name][:-3].clone()


def more_words(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    first = 1 + max(values["model"]["vocab"].values())
    values["added_tokens"] += [
        values["added_tokens"][0] | {"id": first + n, "content": word}
        for n, word in enumerate(("<finding>", "<effusion>", "[LESION]"))
    ]
    (folder / "tokenizer.json").write_text(json.dumps(values))


def one_word_far_away(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["far"] = 999
    (folder / "tokenizer.json").write_text(json.dumps(values))


@pytest.fixture
def student(student_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(student_folder, tmp_path / "student")


BROKEN: dict[str, tuple[Edit, str]] = {
    "vocabulary": (
        more_words,
        r"student.path \S+/student: its tokenizer has 263 tokens, but its embedding has only 260 rows; resize the "
        r"model \(resize_token_embeddings\) and save it",
    ),
    "vocabulary with a hole": (one_word_far_away, "its tokenizer has 1000 tokens, but its embedding has only 260 rows"),
    "flat": (edited("config.json", text_config=None, vision_config=None), "has no text_config and no vision_config"),
    "no tower": (edited("config.json", vision_config=None), "its config.json has no vision_config; it is not in the"),
    "class token": (edited("config.json", vision_feature_select_strategy="full"), "set it to 'default'"),
    "strategy": (
        edited("config.json", vision_feature_select_strategy="half"),
        "config.json: .*expected one of \\('default', 'full'\\), got half",
    ),
    "feature layer": (edited("config.json", vision_feature_layer=-9), "do not run with .*vision_feature_layer -9"),
    "patches": (edited("config.json", vision__image_size=36), "image size 36 is not a multiple of its patch size 8"),
    "oblong": (
        edited("config.json", vision__image_size=[32, 48]),
        r"image_size in vision_config is \[32, 48\]; only towers with square images",
    ),
    "heads": (
        edited("config.json", vision__num_attention_heads=5),
        r"config.json: .*hidden size \(24\) is not a multiple",
    ),
    "image token": (edited("config.json", image_token_id=4000), "image_token_id is 4000, but its tokenizer has 260"),
    "no projector": (
        without("multi_modal_projector"),
        r"4 of its weights are not in its safetensors files .*: model.multi_modal_projector.linear_1.bias, .* again",
    ),
    "no tower weights": (without("vision_tower"), r"39 of its weights are not in .*vision_tower.* and \d+ more; save"),
    "no head": (without("lm_head"), r"1 of its weights are not in .*: lm_head.weight; save"),
    "more blocks": (
        edited("config.json", text__num_hidden_layers=2),
        r"config.json does not describe its safetensors files: 9 of their weights .* and 5 more; correct config.json",
    ),
    "more blocks of the tower": (
        edited("config.json", vision__num_hidden_layers=1),
        r"does not describe its safetensors files: 16 of their weights .*vision_tower.*layers.1.",
    ),
    "foreign weight": (weights(with_foreign), r"1 of their weights do not exist .*: \S*expert.weight; correct"),
    "tied, but saved apart": (
        edited("config.json", tie_word_embeddings=True),
        r"ties lm_head.weight to \S*embed_tokens.weight .*but the two differ .*set tie_word_embeddings to false",
    ),
    "bitsandbytes": (
        edited("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "config.json: quantization_config is 'bitsandbytes': quantized students are not supported",
    ),
    "GPTQ of the language model": (
        edited("config.json", text__quantization_config={"quant_method": "gptq", "bits": 4}),
        "text_config.quantization_config is 'gptq': quantized students are not supported",
    ),
    "unknown quantization": (edited("config.json", quantization_config={"quant_method": "zzz"}), "'zzz': quantized"),
    "patches of 0": (
        edited("config.json", vision__patch_size=0),
        "vision_config.patch_size is 0; it must be at least 1",
    ),
    "no heads": (edited("config.json", text__num_attention_heads=0), "text_config.num_attention_heads is 0; it must"),
    "no key heads": (edited("config.json", text__num_key_value_heads=0), "num_key_value_heads is 0; it must"),
    "activation": (
        edited("config.json", text__hidden_act="zzz"),
        "config.json: text_config.hidden_act is 'zzz', which transformers does not know",
    ),
    "dtype": (edited("config.json", dtype="float99"), "config.json: dtype is 'float99', which is not a type of torch"),
    "null": (written("config.json", "null"), "config.json contains null, not an object with settings; copy"),
    "tokenizer settings": (written("tokenizer_config.json", "[]"), "tokenizer_config.json contains a list, not an"),
    "processor settings": (written("processor_config.json", "[]"), "processor_config.json contains a list, not an"),
    "empty tokenizer": (written("tokenizer.json", "{}"), "tokenizer.json is damaged, or written by another version"),
    "list for a tokenizer": (written("tokenizer.json", "[]"), "tokenizer.json contains a list, not an object"),
    "tokenizer of another version": (edited("tokenizer.json", version="9.0"), "another version .*'9.0' at line 1"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing; copy it"),
    "LFS": (
        written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "model.safetensors is a pointer of Git LFS, not the file itself; run `git lfs pull`",
    ),
    "pickle": (as_pickle, "its weights are in pytorch_model.bin, a pickle, .*; convert them to safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "it has no model.safetensors; copy"),
    "head of another size": (
        weights(shortened_head),
        r"1 of its weights do not have the shape .*: lm_head.weight \[257, 32\], expected \[260, 32\]",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_unusable_student_is_rejected(name: str, student: Path) -> None:
    edit, message = BROKEN[name]
    edit(student)
    with pytest.raises(ConfigError, match=message) as refused:
        check_student(config(student))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("layer", [0, 3, 20])
def test_a_layer_that_does_not_exist(student_folder: Path, layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"student.layer is {layer}, but it must be between 1 and 2"):
        check_student(config(student_folder, layer=layer))


def test_a_rank_of_w_above_the_hidden_size(student_folder: Path) -> None:
    check_student(config(student_folder, steering_rank=32))
    with pytest.raises(ConfigError, match="student.steering_rank is 33, but W is a matrix of 32 x 32"):
        check_student(config(student_folder, steering_rank=33))


def test_missing_weights_are_rejected_when_they_are_read(student: Path) -> None:
    without("multi_modal_projector")(student)
    with pytest.raises(ConfigError, match=r"4 of its weights are not in its safetensors files .*linear_1.bias"):
        load_student(config(student), torch.float32)


def test_a_bare_tokenizer_model_keeps_the_prefix_space(student: Path) -> None:
    """On its own, transformers 5 reads "[INST]" after <s> without it: 28792 in place of 733, without a warning."""
    (student / "tokenizer.json").unlink()
    shutil.copy(mistral.sentencepiece_model(), student / "tokenizer.model")
    (student / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_processor(config(student)).tokenizer
    assert tokenizer("<s>[INST]", add_special_tokens=False)["input_ids"] == [1, 733, 16289, 28793]


def test_a_query_mixture_on_a_fused_projection(tmp_path: Path) -> None:
    """It adds to the queries only: keys and values, the later outputs of the projection, stay as they are."""
    folder = tiny.save_student(tmp_path / "fused", kind=Phi3Config)
    check_student(config(folder, query_mixture=True))
    with pytest.raises(ConfigError, match="official, .* queries, keys and values in one; set it to beside_lora"):
        check_student(config(folder, query_mixture=True, query_mixture_form="official"))
    student = load_student(config(folder, query_mixture=True), torch.float32).eval()
    assert student.mixture is not None
    torch.nn.init.normal_(student.mixture.up)
    outputs: list[torch.Tensor] = []
    student.spec.query_projection(1)[0].register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    with torch.no_grad():
        student(tiny.batch())
        torch.nn.init.zeros_(student.mixture.up)
        student(tiny.batch())
    (mixed, plain), queries = outputs, 32
    assert (mixed[..., :queries] - plain[..., :queries]).abs().max() > 0.01
    assert torch.equal(mixed[..., queries:], plain[..., queries:])


def test_a_language_model_with_other_blocks(tmp_path: Path) -> None:
    folder = tiny.save_student(tmp_path / "jamba", kind=JambaConfig)
    with pytest.raises(ConfigError, match=r"language model \(jamba\) is not a stack of blocks"):
        check_student(config(folder))


@pytest.mark.parametrize(("strategy", "fits"), [("default", False), ("full", True)])
def test_a_tower_without_a_class_token(student_folder: Path, tmp_path: Path, strategy: Any, fits: bool) -> None:
    folder = shutil.copytree(student_folder, tmp_path / "siglip")
    known = LlavaConfig.from_pretrained(folder)
    tower = SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    changed = LlavaConfig(vision_config=tower, text_config=known.text_config, image_token_index=3)
    changed.vision_feature_select_strategy = strategy
    LlavaForConditionalGeneration(changed).save_pretrained(folder)
    if fits:
        assert check_student(config(folder))[0].grid.size == 16
    else:
        with pytest.raises(ConfigError, match=r"returns 15 features .* 4 x 4 patches.*'full' for one with"):
            check_student(config(folder))


@pytest.mark.parametrize(
    ("kind", "settings", "layer", "remedy"),
    [
        (MistralConfig, {"sliding_window": 15}, 1, "choose a student with full attention"),
        (MistralConfig, {"sliding_window": 16}, 1, None),
        (MistralConfig, {"sliding_window": None}, 1, None),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, 2, "layer to 1"),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, 1, None),
    ],
)
def test_a_window_shorter_than_the_image(tmp_path, kind, settings, layer, remedy) -> None:
    folder = tiny.save_student(tmp_path / "student", kind=kind, **settings)
    if remedy is None:
        check_student(config(folder, layer=layer))
    else:
        window = settings["sliding_window"]
        with pytest.raises(
            ConfigError, match=rf"covers only the last {window} tokens, but an image has 16: .*{remedy}"
        ):
            check_student(config(folder, layer=layer))


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    folder = tiny.save_student(tmp_path / "tied", tie_word_embeddings=True)
    spec, processor = check_student(config(folder))
    assert spec.attentions[0].q_proj.weight.is_meta
    assert isinstance(processor.image_processor, CLIPImageProcessor)


def test_tied_weights_may_be_saved_twice(student: Path) -> None:
    def alike(state: dict[str, Any]) -> None:
        state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"].clone()

    weights(alike)(student)
    edited("config.json", tie_word_embeddings=True)(student)
    check_student(config(student))


def test_tied_weights_that_differ_in_several_files(student: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(student)
    (student / "model.safetensors").unlink()
    model.save_pretrained(student, max_shard_size="30KB")
    assert len(list(student.glob("*.safetensors"))) > 2
    check_student(config(student))
    edited("config.json", tie_word_embeddings=True)(student)
    with pytest.raises(ConfigError, match="but the two differ in its safetensors files"):
        check_student(config(student))


def test_buffers_that_transformers_leaves_out_are_not_foreign(student: Path) -> None:
    weights(with_old_buffers)(student)
    check_student(config(student))


@pytest.mark.parametrize(
    ("key", "values", "wanted"),
    [
        ("image_mean", [0.5], "from 0 to 1"),
        ("image_mean", [123, 117, 104], "from 0 to 1 .*not to 255"),
        ("image_mean", ["a", "b", "c"], "three numbers"),
        ("image_mean", [math.nan, 0.5, 0.5], "from 0 to 1"),
        ("image_mean", [-0.1, 0.5, 0.5], "from 0 to 1"),
        ("image_std", [0, 0, 0], "greater than 0 and at most 1"),
        ("image_std", [0, 0.2, 0.2], "greater than 0 and at most 1"),
        ("image_std", [0.2, 0.2, math.inf], "greater than 0 and at most 1"),
        ("image_std", [58, 57, 57], "greater than 0 and at most 1"),
        ("image_std", [True, 0.2, 0.2], "three numbers"),
    ],
)
def test_colors_that_are_not_numbers_of_pixels(student: Path, key: str, values: list[Any], wanted: str) -> None:
    edited("processor_config.json", image_processor={"image_processor_type": "CLIPImageProcessor", key: values})(
        student
    )
    message = rf"student: {key} is {re.escape(repr(values))} in processor_config.json; it must be .*{wanted}"
    with pytest.raises(ConfigError, match=message):
        check_student(config(student))
