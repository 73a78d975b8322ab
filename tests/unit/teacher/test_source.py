import json
import math

import pytest

from medalign.errors import ConfigError
from medalign.teacher.loading import load_teacher, read_preprocess_cfg
from medalign.teacher.source import CONFIG_NAME, find_teacher


def test_unsupported_and_missing_teachers_are_errors(folder, tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        load_teacher(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=CONFIG_NAME):
        load_teacher(tmp_path / "empty")
    with pytest.raises(ConfigError, match="the weights file no-such-tag does not exist"):
        load_teacher("open_clip:ViT-B-32/no-such-tag")
    with pytest.raises(ConfigError, match="would download, and medalign downloads nothing"):
        load_teacher("open_clip:ViT-B-32/laion2b_s34b_b79k")
    with pytest.raises(ConfigError, match="list_models"):
        load_teacher("open_clip:No-Such-Arch/tag")


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (
            {"timm_model_name": "vit_base_patch16_224", "timm_pool": ""},
            "image_size is 48, but vit_base_patch16_224 takes 224 pixels",
        ),
        ({"timm_model_name": "resnet18"}, "resnet18 has a ResNet; supported of timm: VisionTransformer"),
        ({"timm_model_name": "no_such_model"}, "open_clip cannot build model_cfg .*no_such_model"),
        ({"layers": [3, 4, 6, 3]}, "image size 48 is not a multiple of its patch size 32"),
    ],
)
def test_a_tower_that_is_not_supported_is_refused_before_its_weights_are_read(folder, vision, message):
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["model_cfg"]["vision_cfg"].update(vision)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        read_preprocess_cfg(folder)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("vision_cfg", {"image_size": 63}, "image size 63 is not a multiple of .* 8: .* cover only 56 of 63"),
        ("vision_cfg", {"image_size": [48, 64]}, r"vision_cfg.image_size is \[48, 64\]; supported: a positive integer"),
        ("vision_cfg", {"image_size": "48"}, "vision_cfg.image_size is '48'"),
        ("vision_cfg", {"image_size": []}, r"vision_cfg.image_size is \[\]"),
        ("vision_cfg", {"head_widht": 8}, "unknown key 'head_widht' in model_cfg.vision_cfg; did you mean head_width"),
        ("vision_cfg", {"width": "24"}, "cannot build model_cfg"),
        ("preprocess_cfg", {"mean": [0.5]}, r"preprocess_cfg.mean is \[0.5\]; it must be three numbers"),
        ("preprocess_cfg", {"mean": 0.5}, "preprocess_cfg.mean is 0.5"),
        ("preprocess_cfg", {"std": [0.2, 0.2, 0]}, "preprocess_cfg.std is .* greater than 0"),
        ("preprocess_cfg", {"std": [0.2, 0.2, math.nan]}, "preprocess_cfg.std is .* greater than 0 and at most 1"),
        ("preprocess_cfg", {"std": [58, 57, 57]}, "preprocess_cfg.std is .* not to 255"),
        ("preprocess_cfg", {"mean": [123, 117, 104]}, "preprocess_cfg.mean is .* from 0 to 1 .* not to 255"),
    ],
)
def test_the_error_of_an_unusable_config_names_file_and_key(folder, section, changes, message):
    file = folder / CONFIG_NAME
    config = json.loads(file.read_text())
    (config["model_cfg"][section] if section == "vision_cfg" else config[section]).update(changes)
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"{CONFIG_NAME}: .*{message}"):
        load_teacher(folder)
    if "cannot build" not in message:  # all others are detected before the tower is built
        with pytest.raises(ConfigError, match=message):
            read_preprocess_cfg(folder)


@pytest.mark.parametrize("pool", ["avg", "none"])
def test_a_tower_trained_without_its_class_token_is_rejected(make_folder, pool):
    """open_clip then pools the patches, so the attention of the class token in the last block was not trained."""
    vision = {"image_size": 48, "patch_size": 8, "width": 24, "head_width": 8, "layers": 3, "pool_type": pool}
    with pytest.raises(ConfigError, match=f"{CONFIG_NAME}: .*pool_type is '{pool}': its class token"):
        load_teacher(make_folder(vision_cfg=vision))


NO_PREPROCESSING = '{"model_cfg": {"vision_cfg": {"image_size": 48}}, "preprocess_cfg": null}'


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"model_cfg": {}}', "[]", '{"model_cfg": {"vision_cfg": [1]}}', NO_PREPROCESSING]
)
def test_an_invalid_config_is_rejected(folder, text):
    (folder / CONFIG_NAME).write_text(text)
    with pytest.raises(ConfigError, match=f"{CONFIG_NAME} cannot be used"):
        load_teacher(folder)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}, 0.1),
        ("processor_config.json", {"image_processor": {"image_mean": [0.3] * 3, "image_std": [0.2] * 3}}, 0.3),
        ("processor_config.json", {"image_processor": None}, None),
        ("preprocessor_config.json", {"image_mean": [0.1] * 3}, None),  # one of the two is not enough
    ],
)
def test_a_folder_of_transformers_has_its_normalization_in_one_of_two_files(tmp_path, name, content, expected):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    (tmp_path / name).write_text(json.dumps(content))
    if expected is None:
        with pytest.raises(ConfigError, match=rf"{name} does not give the normalization .* set teacher\.(mean|std)"):
            find_teacher(tmp_path)
    else:
        assert find_teacher(tmp_path).mean == [expected] * 3
