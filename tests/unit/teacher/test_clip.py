import json
import math
import pickle

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medalign.errors import CheckpointError, ConfigError
from medalign.geometry import PatchGrid, PreprocessCfg
from medalign.teacher.clip import ConvStem, build_clip, class_attention, load_teacher
from medalign.teacher.source import CONFIG_NAME, WEIGHTS_NAME, read_preprocess_cfg


def test_a_teacher_has_its_preprocessing(folder):
    teacher = load_teacher(folder)
    assert (teacher.grid, teacher.width) == (PatchGrid(6, 6), 24)
    assert teacher.preprocess_cfg == PreprocessCfg(48, (0.4,) * 3, (0.2,) * 3)


def test_features_equal_those_of_clip_after_its_final_norm(folder, pixels):
    whole = build_clip(json.loads((folder / CONFIG_NAME).read_text())["model_cfg"]).eval()
    whole.load_state_dict(load_file(folder / WEIGHTS_NAME))
    whole.visual.output_tokens = True
    _, expected = whole.visual(pixels)
    features, attention = load_teacher(folder)(pixels)
    assert features.shape == (5, 36, 24) and attention.shape == (5, 36)
    torch.testing.assert_close(features, expected)


def test_features_can_be_those_of_the_last_block_before_the_norm(folder, pixels):
    """The final norm has random weights, so that the features differ; the attention is the same."""
    teachers = [load_teacher(folder, features=name) for name in ("before_norm", "after_norm")]
    for teacher in teachers:
        nn.init.normal_(teacher.tower.visual.ln_post.weight, generator=torch.Generator().manual_seed(0))
    seen = []
    teachers[0].tower.visual.transformer.resblocks[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    (before, attention), (after, same) = (teacher(pixels) for teacher in teachers)
    assert torch.equal(before, seen[0][:, 1:])
    mean, variance = before.mean(-1, keepdim=True), before.var(-1, keepdim=True, correction=0)
    norm = teachers[1].tower.visual.ln_post
    torch.testing.assert_close(after, (before - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias)
    assert not torch.allclose(before, after, rtol=0.1) and torch.equal(attention, same)
    with pytest.raises(ValueError, match='features="raw" is none of after_norm, before_norm'):
        load_teacher(folder, features="raw")


@pytest.mark.parametrize("stem", [None, [8, 12], [8, 8, 8]])
def test_attention_is_the_class_row_of_the_full_matrix(make_folder, pixels, stem):
    teacher = load_teacher(make_folder(conv_stem=stem))
    block = teacher.tower.visual.transformer.resblocks[-1]
    seen = []
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _, attention = teacher(pixels)
    normed = block.ln_1(seen[0])
    _, full = block.attn(normed, normed, normed, need_weights=True, average_attn_weights=True)
    assert full.shape == (5, 37, 37)
    torch.testing.assert_close(attention, full[:, 0, 1:], rtol=1e-5, atol=1e-7)


def test_one_pass_gives_features_and_attention_and_no_full_matrix(folder, pixels):
    """Each block runs once. The last block also computes the query of the class token: 37 scores per head."""
    teacher = load_teacher(folder)
    calls, products = [], []
    for number, block in enumerate(teacher.tower.visual.transformer.resblocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))

    class Scores(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "softmax" in str(function):
                products.append(tuple(result.shape))
            return result

    with Scores():
        teacher(pixels)
    assert calls == [0, 1, 2]
    assert (5, 3, 37) in products  # images, heads, keys: one row of the softmax
    assert not any(shape[-2:] == (37, 37) for shape in products)


def test_attention_of_a_sharp_head_differs_from_a_uniform_one():
    torch.manual_seed(0)
    block = open_clip.transformer.ResidualAttentionBlock(16, 2)
    nn.init.normal_(block.attn.in_proj_weight, std=1.0)
    nn.init.normal_(block.attn.in_proj_bias, std=1.0)
    tokens = torch.randn(2, 10, 16)
    normed = block.ln_1(tokens)
    _, full = block.attn(normed, normed, normed, need_weights=True)
    row = class_attention(block, tokens)
    assert row.max() > 0.3
    torch.testing.assert_close(row, full[:, 0, 1:], rtol=1e-5, atol=1e-7)


def test_frozen_and_always_in_eval_mode(folder):
    teacher = load_teacher(folder).train()
    assert not teacher.training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_only_the_vision_tower_is_kept_and_the_callers_seed_is_not_changed(folder):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    teacher = load_teacher(folder)
    assert torch.equal(torch.rand(1), expected)
    assert all(name.startswith("tower.visual.") for name, _ in teacher.named_parameters())


def test_the_untrained_control_is_reproducible_and_reads_no_weights(folder, pixels):
    trained = load_teacher(folder)(pixels)[0]
    (folder / WEIGHTS_NAME).unlink()
    first, again, other = (load_teacher(folder, random_weights_seed=seed)(pixels)[0] for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other) and not torch.allclose(first, trained)


def test_half_precision_stays_close(folder, pixels):
    exact, half = load_teacher(folder)(pixels), load_teacher(folder, dtype=torch.bfloat16)(pixels)
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32
    torch.testing.assert_close(half[1], exact[1], rtol=0.1, atol=1e-3)  # bf16 has a precision of 8 bits


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_any_open_clip_model_by_name_and_file(tmp_path, suffix):
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    file = tmp_path / f"weights{suffix}"
    save_file(model.state_dict(), file) if suffix != ".pt" else torch.save({"state_dict": model.state_dict()}, file)
    teacher = load_teacher(f"open_clip:ViT-S-32-alt/{file}")
    pixels = torch.randn(1, 3, teacher.preprocess_cfg.size, teacher.preprocess_cfg.size)
    model.visual.eval().output_tokens = True
    torch.testing.assert_close(teacher(pixels)[0], model.visual(pixels)[1])


def test_pickled_code_is_rejected(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("ran",))

    file = tmp_path / "weights.pt"
    file.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_teacher(f"open_clip:ViT-S-32-alt/{file}")


def test_unsupported_and_missing_teachers_are_errors(folder, tmp_path):
    with pytest.raises(ConfigError, match=CONFIG_NAME):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="the weights file no-such-tag does not exist"):
        load_teacher("open_clip:ViT-B-32/no-such-tag")
    with pytest.raises(ConfigError, match="would download, and medalign downloads nothing"):
        load_teacher("open_clip:ViT-B-32/laion2b_s34b_b79k")
    with pytest.raises(ConfigError, match="list_models"):
        load_teacher("open_clip:No-Such-Arch/tag")
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "vit_base_patch16_224"
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="vit_base_patch16_224; supported: open_clip's VisionTransformer"):
        load_teacher(folder)


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


def test_truncated_weights_are_rejected(folder):
    file = folder / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_teacher(folder)


def test_weights_of_another_model_are_rejected(folder, make_folder):
    other = make_folder("other", conv_stem=None)
    (folder / WEIGHTS_NAME).write_bytes((other / WEIGHTS_NAME).read_bytes())
    with pytest.raises(CheckpointError, match="do not fit"):
        load_teacher(folder)


def test_the_stem_keeps_the_grid():
    assert ConvStem([4, 6], 10, 8)(torch.zeros(2, 3, 48, 48)).shape == (2, 10, 6, 6)
    with pytest.raises(ConfigError, match="does not divide"):
        ConvStem([4, 6], 10, 6)
