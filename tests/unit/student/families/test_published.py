"""The names and shapes of published weights, at their real size, fit the models without rest in both directions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from medalign.config import StudentConfig, load
from medalign.errors import ConfigError
from medalign.student.families.registry import inspect_model
from medalign.student.model import require_layer
from medalign.student.weights import empty_model
from tests import mistral
from tests.unit.student.families import authors, published


def llava_med(folder: Path, known: dict[str, Any]) -> None:
    shutil.copy(mistral.sentencepiece_model(), folder / "tokenizer.model")
    config = known["config"] | {"model_type": "llava_mistral"}
    (folder / "config.json").write_text(json.dumps(config))


def huatuo(folder: Path, known: dict[str, Any]) -> None:
    authors.save_tokenizer(folder)  # small: only the rows of the embedding matter here
    (folder / "config.json").write_text(json.dumps(known["config"]))


def own_config(folder: Path, known: dict[str, Any]) -> None:
    flat = known["config"].get("flat text keys (hub files before 4.52)", {})
    (folder / "config.json").write_text(json.dumps(known["config"] | flat))


def internvl(folder: Path, known: dict[str, Any]) -> None:
    vision = {"model_type": "internvl_vision", "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True}
    text = {"model_type": "qwen2", "vocab_size": 151674, "hidden_size": 3584, "intermediate_size": 18944}
    text |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = {"model_type": "internvl", "image_token_id": 151667, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": vision, "text_config": text}))


def llava_next(folder: Path, known: dict[str, Any]) -> None:
    vision = known["config"]["vision"] | {"model_type": "clip_vision_model"}
    text = {"model_type": "mistral", "vocab_size": 32064, "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(known["config"] | {"vision_config": vision, "text_config": text}))


MODELS = {
    "llava-next-mistral-7b-hf": (llava_next, 576 + 48 * 49),
    "llava-1.5-7b-hf": (own_config, 576),
    "internvl3-8b-hf": (internvl, 256),
    "llava-med-1.5": (llava_med, 576),
    "huatuogpt-vision-7b": (huatuo, 576),
    "medgemma-4b": (own_config, 256),
    "qwen2.5-vl-7b": (own_config, 576),
    "qwen3-vl-8b": (own_config, 576),
}


class Published(NamedTuple):
    """A folder with the published weights, their shapes, and the number of image tokens."""

    folder: Path
    tensors: published.Shapes
    tokens: int

    @property
    def config(self) -> StudentConfig:
        return StudentConfig(path=str(self.folder))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, shared: Path, tmp_path: Path) -> Published:
    known = published.facts(shared, request.param)
    write, tokens = MODELS[request.param]
    write(tmp_path, known)
    tensors = published.shapes(known)
    published.write_weights(tmp_path, tensors)
    return Published(tmp_path, tensors, tokens)


def test_every_published_weight_has_its_place(model: Published) -> None:
    spec = inspect_model(empty_model(str(model.folder), model.config))
    assert spec.image.count == model.tokens
    assert len(spec.blocks) > model.config.layer


@pytest.mark.parametrize(
    ("name", "recipe", "blocks"),
    [
        ("llava-med-1.5", "llava_med/vqa_rad", 32),
        ("huatuogpt-vision-7b", "huatuo/iu_xray_reports", 28),
        ("qwen2.5-vl-7b", "lingshu/vqa_rad", 28),
        ("qwen3-vl-8b", "qwen3_vl/vqa_rad", 36),
        ("medgemma-4b", "medgemma/vqa_rad", 34),
    ],
)
def test_a_recipe_fits_its_student(shared: Path, tmp_path: Path, name: str, recipe: str, blocks: int) -> None:
    """The tapped block exists and covers an image, and a sample has room for text beside the image."""
    known = published.facts(shared, name)
    MODELS[name][0](tmp_path, known)
    published.write_weights(tmp_path, published.shapes(known))
    words = ["--student.path", str(tmp_path), "--teacher.path", "none", "--data.train", "none"]
    config = load(recipe, words, models=False)
    spec = inspect_model(empty_model(str(tmp_path), config.student))
    assert len(spec.blocks) == blocks
    require_layer(config.student.layer, spec)
    assert spec.window(config.student.layer) is None
    assert spec.image.count + 256 < config.data.max_length


@pytest.mark.parametrize("part", [0, -1])
def test_a_published_folder_without_one_weight_is_refused(model: Published, part: int) -> None:
    del model.tensors[list(model.tensors)[part]]
    published.write_weights(model.folder, model.tensors)
    with pytest.raises(ConfigError, match="[12] of its weights are not in its safetensors files"):
        empty_model(str(model.folder), model.config)
