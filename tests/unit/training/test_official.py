"""The recipe `official/vqa_rad` against a plain implementation of the released code's loss.

The plain implementation computes sample by sample, with eager attention of all tokens, without masks and kernels. The
losses and the gradients of all trained parameters are compared.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from medalign import assembly, config, pipeline
from medalign.contracts import IGNORE, Batch, Sample
from medalign.data.batches.collator import Collator
from medalign.losses import build_objective
from medalign.student.loading import load_processor, load_student
from medalign.student.model import Student
from medalign.teacher.model import Teacher
from medalign.teacher.targets import teacher_targets

LAYER = 2
ALPHA, BETA = 3.0, 300.0  # of random models, so that no term hides behind another
TEXTS = [
    ("Is it normal?", "yes"),
    ("Describe.", "Heart: large. Lungs: clear, no effusion"),  # the rows end inside the answer
    ("Which side: left or right?", "the left one"),
    ("What is seen?", "nodule"),
]


@pytest.fixture
def settings(student_folder, teacher_folder) -> config.Config:
    words = ["--student.path", str(student_folder), "--teacher.path", str(teacher_folder), "--data.train", "none"]
    words += ["--student.layer", str(LAYER), "--student.attention", "eager", "--student.query_mixture", "true"]
    words += ["--losses.alpha", str(ALPHA), "--losses.beta", str(BETA)]
    return config.load("official/vqa_rad", [*words, "--student.gradient_checkpointing", "false"])


def samples() -> list[Sample]:
    """Pictures of noise; the last sample has none."""
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (len(TEXTS), 20, 20, 3), generator=draw, dtype=torch.uint8).numpy()
    return [
        Sample(f"s{i}", "none", "vqa", *text, "open", (Image.fromarray(pictures[i]),) if i < 3 else ())
        for i, text in enumerate(TEXTS)
    ]


def build(settings: config.Config) -> tuple[Student, Teacher, Collator]:
    """Everything that learns starts at random; in eval mode, so that nothing is dropped."""
    student = load_student(settings.student, torch.float32).eval()
    torch.manual_seed(1)
    for named in student.trainable().values():
        for _, parameter in named:
            torch.nn.init.normal_(parameter, std=0.05)
    (teacher,) = assembly.build_teachers(settings)
    processor = load_processor(settings.student)
    collator = pipeline.build_collator(settings, student.spec, processor, teacher.preprocess_cfg, 1)
    return student, teacher, collator


def gradients(student: Student) -> dict[str, torch.Tensor]:
    return {name: p.grad for named in student.trainable().values() for name, p in named if p.grad is not None}


def ours(settings, student, teacher, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    objective = build_objective(settings)
    counts = [objective.counts(batch) for batch in batches]
    scale = {name: 1 / float(sum(count[name] for count in counts)) for name in counts[0]}
    student.zero_grad()
    total = 0.0
    for batch in batches:
        targets = teacher_targets(teacher, batch.teacher_pixels, student.spec.grid)
        report = objective(student(batch), targets, batch, scale)
        report.total.backward()
        total += float(report.total.detach())
    return total, gradients(student)


def plain_teacher(teacher: Teacher, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last block's output before the final norm, resampled to 4 x 4, [16, b]; the class token's attention [16]."""
    visual, seen = teacher.tower.visual, {}
    block = visual.transformer.resblocks[-1]
    handle = block.register_forward_hook(lambda _, inputs, output: seen.update(input=inputs[0], output=output))
    with torch.no_grad():
        visual(pixels)
        normed = block.ln_1(seen["input"])
        _, weights = block.attn(normed, normed, normed, need_weights=True, average_attn_weights=True)
    handle.remove()

    def resample(patches_MC: torch.Tensor) -> torch.Tensor:
        square = patches_MC.T.reshape(1, -1, 6, 6)
        return F.interpolate(square, size=(4, 4), mode="bilinear", align_corners=False).flatten(2)[0].T

    return resample(seen["output"][0, 1:]), resample(weights[0, 0, 1:, None])[:, 0]


def plain_sample(student, teacher, batch: Batch, tokenizer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Language loss and distillation loss of a batch of one sample; the latter None without an image."""
    seen, block = {}, student.spec.blocks[LAYER]
    handles = [
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.update(hidden=args[0]), with_kwargs=True),
        block.self_attn.register_forward_hook(lambda _, args, output: seen.update(weights=output[1])),
    ]
    labels = batch.labels[0]
    output = student(replace(batch, labels=batch.input_ids))
    for handle in handles:
        handle.remove()
    language = F.cross_entropy(output.logits[0, : len(labels) - 1], labels[1:], ignore_index=IGNORE)
    if batch.image_weight.sum() == 0:
        return language, None
    places = (batch.input_ids[0] == student.spec.image_token_id).nonzero()[:, 0]
    first, last = int(places[0]), int(places[-1])
    text = [tokenizer.decode([token]) for token in batch.input_ids[0]]
    colon = max(place for place, piece in enumerate(text) if piece == ":")
    assert colon > last
    x, (e, t) = seen["hidden"][0, first : last + 1], plain_teacher(teacher, batch.teacher_pixels)
    x, e = x / x.norm(dim=1, keepdim=True), e / e.norm(dim=1, keepdim=True)
    spatial = (x @ x.T - e @ e.T).square().mean()
    m = seen["weights"][0].mean(0)[last + 1 : colon + 1, first : last + 1].mean(0)
    p, t = m / m.norm(), t / t.norm()
    attention = (t * (t.log() - p.log())).sum() / len(t)
    return language, ALPHA * spatial + BETA * attention


def plain(student, teacher, batches: list[Batch], tokenizer) -> tuple[float, dict[str, torch.Tensor]]:
    student.zero_grad()
    losses = [plain_sample(student, teacher, batch, tokenizer) for batch in batches]
    distilled = [loss for _, loss in losses if loss is not None]
    total = sum(loss for loss, _ in losses) / len(losses) + sum(distilled) / len(distilled)
    total.backward()
    return float(total.detach()), gradients(student)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", [[4], [3, 1], [1, 1, 2]])
def test_values_and_gradients_are_those_of_a_plain_implementation(settings, cut, packed):
    """float32 in other orders of sums: a few 1e-6 of the largest entry."""
    student, teacher, collator = build(settings)
    questions = samples()
    expected, plain_gradients = plain(student, teacher, [collator([q]) for q in questions], collator.encoder.tokenizer)
    plain_gradients = {name: gradient.clone() for name, gradient in plain_gradients.items()}
    collator.packed = packed
    starts = [sum(cut[:i]) for i in range(len(cut))]
    batches = [collator(questions[start : start + n]) for start, n in zip(starts, cut, strict=True)]
    found, our_gradients = ours(settings, student, teacher, batches)
    assert found == pytest.approx(expected, rel=1e-5)
    assert our_gradients.keys() == plain_gradients.keys() and any("mixture" in name for name in our_gradients)
    for name, gradient in plain_gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=2e-5 * scale + 1e-9, msg=name)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("teacher", "features", "after_norm"),
        ("losses", "language_mean", "tokens"),
        ("losses", "attention_rows", "prompt"),
        ("losses", "normalize", "sum"),
    ],
)
def test_each_choice_counts(settings, section, name, value):
    """With our own choice in its place, the comparison above would fail: each moves some gradient by a percent."""
    found = []
    for changed in (False, True):
        if changed:
            setattr(getattr(settings, section), name, value)
        student, teacher, collator = build(settings)
        # The tiny tower's final norm is not trained, and scales all channels alike.
        torch.nn.init.normal_(teacher.tower.visual.ln_post.weight, generator=torch.Generator().manual_seed(3))
        found.append(ours(settings, student, teacher, [collator(samples())])[1])
    moved = [(found[1][key] - gradient).abs().max() / gradient.abs().max() for key, gradient in found[0].items()]
    assert max(moved) > 0.01
