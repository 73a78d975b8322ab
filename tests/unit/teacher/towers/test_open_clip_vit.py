import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from medalign.errors import ConfigError
from medalign.teacher.loading import load_teacher
from medalign.teacher.source import CONFIG_NAME, WEIGHTS_NAME
from medalign.teacher.towers.conv_stem import ConvStem
from medalign.teacher.towers.open_clip_vit import build_clip


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


def test_the_stem_keeps_the_grid():
    assert ConvStem([4, 6], 10, 8)(torch.zeros(2, 3, 48, 48)).shape == (2, 10, 6, 6)
    with pytest.raises(ConfigError, match="does not divide"):
        ConvStem([4, 6], 10, 6)
