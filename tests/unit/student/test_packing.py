"""Packed and padded batches give the same outputs, losses and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig

from medalign.config import LoraConfig, LossConfig, StudentConfig
from medalign.contracts import Batch, StudentOutput
from medalign.geometry import PatchGrid
from medalign.losses import Objective, build_terms
from medalign.student import model, packing
from medalign.student.loading import load_student
from medalign.student.model import Student, check_causality
from medalign.teacher.loading import load_teacher
from medalign.teacher.targets import teacher_targets
from tests import tiny

TEXTS = ((5, 4), (9, 2), (1, 1))
TERMS = ("language", "similarity", "attention")


def load(folder, **settings) -> Student:
    """Load a student whose adapters, W and mixture change the output."""
    defaults = {"path": str(folder), "layer": 2, "lora": LoraConfig(rank=4, alpha=8), "attention": "sdpa"}
    student = load_student(StudentConfig(**(defaults | settings)), torch.float32)
    torch.manual_seed(1)
    for named in student.trainable().values():
        for _, parameter in named:
            torch.nn.init.normal_(parameter, std=0.05)
    return student


def supervised_logits(output: StudentOutput, batch: Batch) -> torch.Tensor:
    """In the order of the samples."""
    targets = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=-100)[:, output.kept]
    return output.logits[targets != -100]


def step(student: Student, batch: Batch, teacher_folder) -> tuple[StudentOutput, dict[str, float], dict]:
    """The student's output, the losses' sums and the gradients of their mean over the batch."""
    objective = Objective(build_terms(LossConfig(beta=0.5)))
    pixels = torch.nn.functional.interpolate(batch.teacher_pixels, size=48)
    targets = teacher_targets(load_teacher(teacher_folder), pixels, PatchGrid(4, 4))
    output = student(batch)
    scale = {name: 1 / max(float(count), 1) for name, count in objective.counts(batch).items()}
    report = objective(output, targets, batch, scale)
    student.zero_grad()
    report.total.backward()
    gradients = {name: p.grad.clone() for named in student.trainable().values() for name, p in named}
    return output, {name: float(report.terms[name].sum.detach()) for name in TERMS}, gradients


@pytest.mark.parametrize(
    ("kind", "language", "settings"),
    [
        (LlamaConfig, {}, {}),
        (LlamaConfig, {}, {"attention": "eager", "query_mixture": True}),
        (LlamaConfig, {}, {"gradient_checkpointing": True, "query_mixture": True, "train_projector": True}),
        (MistralConfig, {"sliding_window": 11}, {}),
        (
            Gemma2Config,
            {"sliding_window": 11, "attn_logit_softcapping": 0.5, "head_dim": 8},
            {"attention": "eager"},
        ),
    ],
)
def test_packed_equals_padded(tmp_path, teacher_folder, kind, language, settings):
    """float32: other shapes change the order of sums, which changes a gradient by 1e-6 of its largest element.

    Text lengths differ, and with them the rotary positions.
    """
    student = load(tiny.save_student(tmp_path / "student", kind=kind, **language), **settings).train()
    padded = tiny.batch(texts=TEXTS)
    packed = tiny.packed(padded)
    assert packed.input_ids.shape == (1, sum(packed.lengths)) and not padded.attention_mask.all()
    expected, losses, gradients = step(student, padded, teacher_folder)
    found, packed_losses, packed_gradients = step(student, packed, teacher_folder)
    torch.testing.assert_close(
        supervised_logits(found, packed), supervised_logits(expected, padded), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.attention, expected.attention, rtol=1e-4, atol=1e-6)
    assert packed_losses == pytest.approx(losses, rel=1e-5)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=0, atol=5e-6 * scale + 1e-9, msg=name)


def test_text_next_to_images(student_folder, teacher_folder):
    """The second of three samples has no image: no image is counted for it, and the other samples keep theirs."""
    student = load(student_folder).train()
    one, two = tiny.batch(texts=((5, 4),), seed=1), tiny.batch(texts=((3, 6),), seed=2)
    text = tiny.packed(tiny.batch(texts=((7, 3),), images=False, seed=3))
    parts = [tiny.packed(one), text, tiny.packed(replace(two, image_index=two.image_index.clamp(max=0)))]
    parts[2] = replace(parts[2], image_index=torch.where(parts[2].image_index >= 0, 1, -1))
    flat = {
        name: torch.cat([getattr(part, name) for part in parts], dim=1)
        for name in ("input_ids", "attention_mask", "labels", "question_mask", "image_index")
    }
    images = {
        name: torch.cat([getattr(part, name) for part in (one, two)])
        for name in ("student_pixels", "teacher_pixels", "image_weight", "patch_valid")
    }
    lengths = tuple(part.input_ids.shape[1] for part in parts)
    joined = Batch(**flat, **images, image_sample=torch.tensor([0, 2]), lengths=lengths)
    counts = Objective(build_terms(LossConfig(beta=1.0))).counts(joined)
    assert [int(counts[name]) for name in TERMS] == [4 + 3 + 6, 2, 2]
    _, losses, _ = step(student, joined, teacher_folder)
    singles = [step(student, batch, teacher_folder)[1] for batch in (one, two)]
    for name in ("similarity", "attention"):
        assert losses[name] == pytest.approx(sum(single[name] for single in singles), rel=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_no_sample_attends_to_another(student_folder, backend):
    check_causality(load(student_folder, attention=backend), tiny.packed(tiny.batch(texts=TEXTS)))


def test_a_backend_that_ignores_the_boundaries_is_detected(student_folder, monkeypatch):
    """The check at the start must fail if the model treats the samples of a row as one sequence."""
    batch = tiny.packed(tiny.batch(texts=TEXTS))
    running = {"position_ids": torch.arange(batch.input_ids.shape[1])[None], "sample_lengths": ()}
    monkeypatch.setattr(model, "forward_arguments", lambda batch: packing.forward_arguments(batch) | running)
    for backend in ("sdpa", "eager"):
        with pytest.raises(RuntimeError, match="not causal"):
            check_causality(load(student_folder, attention=backend), batch)


def test_sdpa_builds_no_mask_for_the_packed_row(student_folder, monkeypatch):
    """Each sample is processed separately: the largest product is that of the longest sample."""
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        seen.append((query.shape[2], attn_mask))
        return real(query, key, value, attn_mask=attn_mask, **kwargs)

    student, batch = load(student_folder), tiny.packed(tiny.batch(texts=TEXTS))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    student(batch)
    decoder = [(length, mask) for length, mask in seen if length != 17]  # the vision tower's 16 patches and class token
    assert [length for length, _ in decoder] == list(batch.lengths) * 3
    assert all(mask is None for _, mask in decoder)


def test_flash_attention_gets_the_boundaries(student_folder):
    """Instead of a mask, it takes the boundaries of the samples and the length of the longest one."""
    arguments = packing.forward_arguments(tiny.packed(tiny.batch(texts=TEXTS)))
    assert arguments["attention_mask"] is None
    assert arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 26, 54, 73]
    assert arguments["max_length_q"] == arguments["max_length_k"] == 28
    assert arguments["position_ids"][0].tolist() == [*range(26), *range(28), *range(19)]
