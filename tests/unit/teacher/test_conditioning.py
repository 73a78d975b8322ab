import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from medalign.contracts import StudentOutput
from medalign.geometry import PatchGrid
from medalign.teacher.conditioning import TextConditioning
from medalign.teacher.lexicon import Finding, Lexicon
from medalign.teacher.loading import load_teacher
from medalign.teacher.targets import teacher_targets
from medalign.training.step import TrainStep
from tests.unit.teacher.towers.test_texts import PHANTOM

LEXICON = Lexicon({name: Finding((name,), ("x",), ("y",)) for name in ("nodule", "effusion", "edema")})
QUESTIONS = ["Is there a nodule?", "Is this normal?", "Effusion or edema?"]


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(3, 10, generator=generator) / 20
    values, present, absent = (torch.randn(*shape, generator=generator) for shape in ((3, 10, 4), (3, 4), (3, 4)))
    return attention, values, present, absent


def by_hand(values, texts, absent, temperature, gamma):
    """The map of one image for the findings of one question, number by number."""
    text, other = texts.sum(0).tolist(), absent.sum(0).tolist()

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))

    scores = [(cosine(v, text) - gamma * cosine(v, other)) / temperature for v in values.tolist()]
    total = sum(math.exp(score) for score in scores)
    return torch.tensor([math.exp(score) / total for score in scores])


@pytest.mark.parametrize(("weight", "gamma"), [(1.0, 0.0), (0.3, 1.0), (1.0, 0.5)])
def test_the_formula(drawn, weight, gamma):
    attention, values, present, absent = drawn
    conditioning = TextConditioning(LEXICON, present, absent, weight=weight, temperature=0.2, absent_weight=gamma)
    found = conditioning(attention, conditioning.relevance(values), QUESTIONS)
    own = attention / attention.sum(1, keepdim=True)
    asked = {0: [0], 2: [1, 2]}
    for image, findings in asked.items():
        text = by_hand(values[image], present[findings], absent[findings], 0.2, gamma)
        torch.testing.assert_close(found[image], (1 - weight) * own[image] + weight * text, rtol=1e-5, atol=1e-7)
    assert torch.equal(found[1], own[1])  # the question names no finding
    torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_a_question_is_needed_for_each_image(drawn):
    attention, values, present, absent = drawn
    conditioning = TextConditioning(LEXICON, present, absent, weight=1, temperature=0.05, absent_weight=0)
    with pytest.raises(ValueError, match="2 questions for 3 images"):
        conditioning(attention, conditioning.relevance(values), QUESTIONS[:2])


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(2))


def test_without_text_weight_the_question_changes_nothing(pixels):
    teacher = load_teacher(PHANTOM)
    assert torch.equal(teacher(pixels, QUESTIONS)[1], teacher(pixels)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_target_follows_the_question_and_the_features_do_not(pixels, dtype):
    plain, teacher = load_teacher(PHANTOM, dtype=dtype), load_teacher(PHANTOM, dtype=dtype, text_weight=1.0)
    features, attention = teacher(pixels, QUESTIONS)
    other_features, other = teacher(pixels, [QUESTIONS[2], QUESTIONS[1], QUESTIONS[2]])
    assert attention.dtype == torch.float32 and torch.equal(features, other_features)
    assert torch.equal(features, plain(pixels)[0])
    assert not torch.allclose(attention[0], other[0], rtol=0.1)
    assert torch.equal(attention[1:], other[1:])
    assert F.cosine_similarity(attention[1], plain(pixels)[1][1], dim=0) > 1 - 1e-6
    assert teacher.conditioning.present.dtype == torch.float32


def test_the_step_gives_the_teacher_each_images_question(pixels):
    """Two samples, the second with two images: the teacher gets the sample's question for each of them."""
    teacher, grid, seen = load_teacher(PHANTOM, text_weight=1.0), PatchGrid(12, 12), []
    engine = lambda batch, tap: StudentOutput(torch.zeros(1), torch.zeros(1), None, None)  # noqa: E731
    engine.device = torch.device("cpu")
    step = TrainStep(engine, teacher, lambda output, targets, batch, scale: seen.append(targets), grid)
    questions = (QUESTIONS[0], QUESTIONS[2], QUESTIONS[2])
    valid, weight = torch.ones(3, grid.size, dtype=torch.bool), torch.ones(3)
    batch = SimpleNamespace(
        teachers=({"pixels": pixels},),
        image_questions=questions,
        image_reports=("",) * 3,
        patch_valid=valid,
        image_weight=weight,
    )
    step._forward(batch, {})
    assert len(step.sink_monitors[0]._seen[0].top) == 3  # the monitor of sinks sees the same targets
    expected = teacher_targets(teacher, pixels, grid, questions)
    assert torch.equal(seen[0].attention, expected.attention)


def test_a_report_that_states_a_finding_has_the_map_of_a_question_about_it(drawn):
    attention, values, present, absent = drawn
    settings = {"weight": 1.0, "temperature": 0.2, "absent_weight": 0.5}
    plain = TextConditioning(LEXICON, present, absent, **settings)
    reading = TextConditioning(LEXICON, present, absent, reports=True, **settings)
    relevance, request = plain.relevance(values), ["Describe the film."] * 3
    reports = ["A nodule. No effusion.", "No edema.", ""]
    expected = plain(attention, relevance, ["Is there a nodule?", *request[1:]])
    assert torch.equal(reading(attention, relevance, request, reports), expected)
    assert torch.equal(plain(attention, relevance, request, reports), plain(attention, relevance, request))
    with pytest.raises(ValueError, match="0 reports for 3 images"):
        reading(attention, relevance, request)
