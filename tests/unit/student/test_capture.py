"""The student compared with eager attention in transformers: attention, causality, steering, padding, checkpointing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Gemma2Config, MistralConfig

from medalign.config import LoraConfig, StudentConfig
from medalign.contracts import ImageTokens
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid, gather_images
from medalign.student import capture
from medalign.student.loading import load_student
from medalign.student.model import Student, check_causality
from medalign.student.packing import forward_arguments
from tests import tiny


def load(folder, **settings) -> Student:
    defaults = {"path": str(folder), "layer": 2, "lora": LoraConfig(rank=4, alpha=8), "attention": "sdpa"}
    return load_student(StudentConfig(**(defaults | settings)), torch.float32)


def disturb(student: Student) -> None:
    """Make the adapters and W change the output: they are initialized to zero."""
    torch.manual_seed(1)
    for named in student.trainable().values():
        for _, parameter in named:
            torch.nn.init.normal_(parameter, std=0.05)


def assert_map_is_the_mean_of_eager_attention(folder, side="right", **settings):
    """fp32, 1e-5: the two sums differ only in their order. The model has grouped-query attention."""
    student = load(folder, **settings).eval()
    disturb(student)
    batch = tiny.batch(side=side)
    with torch.no_grad():
        output = student(batch)
        eager = load(folder, **(settings | {"attention": "eager"})).eval()
        eager.load_state_dict(student.state_dict())
        eager._begin_batch(batch)
        weights_BHLL = eager.model(
            input_ids=batch.input_ids,
            pixel_values=batch.student_pixels,
            output_attentions=True,
            **forward_arguments(batch),
        ).attentions[2]
    mean_BLL = weights_BHLL.mean(1)
    rows = [mean_BLL[b][batch.question_mask[b]].mean(0) for b in range(2)]
    expected = gather_images(torch.stack(rows), batch.cells, 2, 16)
    assert expected.sum() > 0.1
    torch.testing.assert_close(output.attention, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("steering", [True, False])
def test_tapped_map_is_the_mean_of_eager_attention(student_folder, side, steering):
    assert_map_is_the_mean_of_eager_attention(student_folder, side, steering=steering)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("kind", "language", "backend"),
    [
        (MistralConfig, {"sliding_window": 11}, "sdpa"),
        (Gemma2Config, {"sliding_window": 11, "attn_logit_softcapping": 0.5, "head_dim": 8}, "eager"),
    ],
)
def test_the_map_has_the_windows_and_the_softcap_of_the_model(tmp_path, side, kind, language, backend):
    """Gemma 2 caps the scores of every block and has sliding windows in every other block. The tapped one has both."""
    folder = tiny.save_student(tmp_path / "student", kind=kind, **language)
    assert_map_is_the_mean_of_eager_attention(folder, side, attention=backend)
    original = capture.AttentionCapture.capture
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="not close"):
        patch.setattr(capture.AttentionCapture, "capture", lambda *arguments: original(*arguments[:-1], {}))
        assert_map_is_the_mean_of_eager_attention(folder, side, attention=backend)


def test_a_packed_batch_is_captured_by_its_sequences():
    """flash_attention_2 gets concatenated sequences and their boundaries, and so does the capture."""
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 12, 8, generator=draw), torch.randn(2, 2, 12, 8, generator=draw)
    rows, columns = torch.rand(2, 12, generator=draw) < 0.4, torch.rand(2, 12, generator=draw) < 0.6
    apart, packed = capture.AttentionCapture(), capture.AttentionCapture()
    with apart.recording(rows, columns, torch.ones_like(rows)):
        apart.capture(query, key, 0.3, {})
    flat = [tensor.transpose(0, 1).flatten(1, 2)[None] for tensor in (query, key)]
    with packed.recording(rows.view(1, -1), columns.view(1, -1), torch.ones(1, 24, dtype=torch.bool)):
        packed.capture(*flat, 0.3, {"cu_seq_lens_q": torch.tensor([0, 12, 24], dtype=torch.int32)})
    torch.testing.assert_close(packed.attention.view(2, 12), apart.attention)


def test_padding_side_changes_nothing(student_folder):
    student = load(student_folder).eval()
    disturb(student)
    with torch.no_grad():
        right, left = student(tiny.batch(side="right")), student(tiny.batch(side="left"))
    torch.testing.assert_close(right.attention, left.attention, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(right.tokens, left.tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_future_token_changes_no_earlier_logit(student_folder, backend):
    student = load(student_folder, attention=backend)
    check_causality(student, tiny.batch())
    check_causality(student, tiny.batch(side="left"))


def test_a_backend_without_its_mask_is_detected(student_folder, monkeypatch):
    """The check at the start must fail without causality, which is lost without the mask function."""
    student = load(student_folder, attention="eager")
    monkeypatch.setattr(
        capture,
        "_backend",
        lambda *_: (
            lambda module, q, k, v, mask, **kw: (
                torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2),
                None,
            )
        ),
    )
    with pytest.raises(RuntimeError, match="not causal"):
        check_causality(student, tiny.batch())


def test_gradients_are_equal_with_checkpointing(student_folder):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        student = load(student_folder, gradient_checkpointing=checkpointing).train()
        disturb(student)
        output = student(tiny.batch())
        (output.logits.square().mean() + output.tokens.square().mean() + output.attention.square().sum()).backward()
        return {name: p.grad for named in student.trainable().values() for name, p in named}

    plain, recomputed = gradients(False), gradients(True)
    assert all(value.abs().max() > 0 for name, value in plain.items() if ".layers.2.mlp" not in name)
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_steering_changes_only_image_tokens(student_folder):
    student = load(student_folder).eval()
    batch = tiny.batch()
    with torch.no_grad():
        before = student(batch).tokens
        torch.nn.init.normal_(student.steering.weight, std=0.1)
        after = student(batch).tokens
    torch.testing.assert_close(after, before + before @ student.steering.weight.T)


def test_features_that_the_model_adds_between_blocks_are_steered(student_folder):
    """W acts on the input of block l, which is not the output of block l-1 in every model."""
    student = load(student_folder).eval()
    torch.nn.init.normal_(student.steering.weight, std=0.1)
    with torch.no_grad():
        before = student(tiny.batch()).tokens
        handle = student.spec.blocks[1].register_forward_hook(lambda _block, _inputs, hidden: hidden + 1)
        after = student(tiny.batch()).tokens
        handle.remove()
    added = torch.ones_like(before)
    # float32, sums over 32 channels in another order
    torch.testing.assert_close(after - before, added + added @ student.steering.weight.T, rtol=1e-4, atol=1e-4)


def test_image_tokens_that_are_not_cells(student_folder):
    """Tokens that only accompany the cells are neither steered nor part of the map."""
    student, batch = load(student_folder).eval(), tiny.batch()
    disturb(student)
    cells = batch.image_index >= 0
    for start in range(1, 17, 4):  # the last token of each row of the grid
        cells[:, start + 3] = False
    student.spec = replace(student.spec, image=ImageTokens(3, PatchGrid(4, 3)))
    with torch.no_grad():
        every = student(batch, tap=False).logits
        output = student(replace(batch, cell_mask=cells))
        torch.nn.init.zeros_(student.steering.weight)
        plain = student(replace(batch, cell_mask=cells))
    assert output.tokens.shape == (2, 12, 32) and output.attention.shape == (2, 12)
    assert not torch.allclose(output.logits, every)
    assert not torch.equal(output.tokens, plain.tokens)


def test_a_batch_without_images_keeps_every_gradient_path(student_folder):
    """W, the adapters and the projector must get a gradient (of zero), otherwise ZeRO-3 would wait for it."""
    student = load(student_folder, train_projector=True).train()
    output = student(tiny.batch(images=False))
    assert output.attention.shape == (1, 16) and output.attention.abs().max() == 0
    (output.logits.square().mean() + 0 * output.tokens.sum()).backward()
    groups = student.trainable()
    assert set(groups) == {"adapters", "steering", "projector"}
    assert all(p.grad is not None for named in groups.values() for _, p in named)
    assert student.steering.weight.grad.abs().max() == 0


def test_only_adapters_steering_and_projector_are_trainable(student_folder):
    student = load(student_folder, train_projector=True)
    learning = {name for named in student.trainable().values() for name, _ in named}
    assert all("lora_" in n or n.startswith("steering") or "multi_modal_projector" in n for n in learning)
    assert not any("vision_tower" in name for name in learning)
    adapted = {name for name in learning if "lora_A" in name}
    assert len(adapted) == 3 * 7  # every linear layer of every block of the language model


def test_the_layer_must_exist(student_folder):
    with pytest.raises(ConfigError, match="student.layer is 3.*0 to 2"):
        load(student_folder, layer=3)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="not a model folder"):
        load(tmp_path)


def test_generation_captures_the_question_once(student_folder):
    student = load(student_folder).eval()
    disturb(student)
    batch = tiny.batch(side="left", texts=((5, 0), (9, 0)))
    ids, attention = student.generate(batch, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
    assert ids.shape[0] == 2 and 1 <= ids.shape[1] <= 6
    with torch.no_grad():
        forward = student(tiny.batch(side="left", texts=((5, 0), (9, 0)))).attention
    torch.testing.assert_close(attention, forward, rtol=1e-4, atol=1e-6)


def test_steering_changes_generation(student_folder):
    student = load(student_folder).eval()
    batch = tiny.batch(side="left", texts=((5, 0), (9, 0)))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    before, _ = student.generate(batch, **settings)
    torch.manual_seed(0)
    torch.nn.init.normal_(student.steering.weight, std=3.0)
    after, _ = student.generate(batch, **settings)
    assert before.tolist() != after.tolist()


def test_query_mixture_trains_and_generates(student_folder):
    student = load(student_folder, query_mixture=True).train()
    student(tiny.batch()).logits.square().mean().backward()
    assert student.mixture.up.grad.abs().max() > 0
    ids, _ = student.eval().generate(
        tiny.batch(side="left", texts=((5, 0), (9, 0))), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert ids.shape[0] == 2
