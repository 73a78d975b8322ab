"""Every contrast equals one written from its paper: one sample, no cache, eager attention, the model's own class."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medalign.contracts import Batch, Sample
from medalign.decoding.base import Decoding, Method
from medalign.decoding.contrast import join_views, without_images
from medalign.decoding.methods.avisc import AvisC
from medalign.decoding.methods.damro import DAMRO
from medalign.decoding.methods.dola import DoLa
from medalign.decoding.methods.imccd import IMCCD, _Prompts
from medalign.decoding.methods.m3id import M3ID
from medalign.decoding.methods.vcd import VCD, noise_of, signal_left
from medalign.errors import ConfigError
from medalign.student.checks import check_student
from medalign.student.model import Student
from tests.unit.student.families.cases import CASES
from tests.unit.student.families.test_families import Model, collate, own_inputs, reference, student_of

QUESTIONS = (("Is the heart large?", 1), ("Compare both films.", 2), ("What is a nodule?", 0), ("Is it new?", 1))
LIMIT = 5
Inputs = dict[str, Any]


@dataclass
class Asked:
    """A student, its model's own class, samples of one, two, no and one images, and the batch of all of them."""

    model: Model
    student: Student
    own: Any
    batch: Batch

    @property
    def samples(self) -> list[Sample]:
        return self.model.samples

    def answers(self, method: Method, rows: slice = slice(None), **settings: Any) -> list[list[int]]:
        """The tokens of each answer, without ends and what follows them."""
        batch = collate(self.model, self.student, self.samples[rows], with_answer=False, padding_side="left")
        decoding = Decoding(LIMIT, method=method, **settings)
        ids, _ = method.generate(self.student, batch, decoding, pad_token_id=0, eos_token_id=self.student.end_tokens)
        return [cut(row, self.student.end_tokens) for row in ids.tolist()]


def cut(tokens: list[int], ends: list[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


@pytest.fixture(scope="module", params=["llava", "llava_mistral", "qwen2_5_vl", "gemma3", "qwen3_vl"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return ask(request.param, tmp_path_factory.mktemp("contrast"))


def ask(name: str, folder: Path) -> Asked:
    case = CASES[name]
    config = case.config(case.save(folder / name))
    spec, processor = check_student(config)
    draw = np.random.default_rng(0)
    shape = (spec.image_size, spec.image_size, 3)
    taken = iter([Image.fromarray(draw.integers(0, 255, shape, dtype=np.uint8)) for _ in range(4)])
    samples = [
        Sample(f"s{i}", "shard", "vqa", question, "Yes.", "open", tuple(next(taken) for _ in range(count)))
        for i, (question, count) in enumerate(QUESTIONS)
    ]
    model = Model(case, folder / name, config, processor, samples)
    student = student_of(model)
    batch = collate(model, student, samples, with_answer=False, padding_side="left")
    return Asked(model, student, reference(model), batch)


def extended(inputs: Inputs, answer: list[int]) -> Inputs:
    """The inputs of a model with tokens of the answer at their end."""
    more = torch.tensor([answer], dtype=torch.long)
    found = dict(inputs)
    for name, values in inputs.items():
        if name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            fill = more if name == "input_ids" else torch.full_like(more, int(name == "attention_mask"))
            found[name] = torch.cat([values, fill.to(values.dtype)], 1)
    return found


def without(inputs: Inputs, token: int) -> Inputs:
    """The inputs without images and their tokens."""
    kept = inputs["input_ids"][0] != token
    names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return {name: inputs[name][:, kept] for name in names if name in inputs}


@torch.no_grad()
def logits(own: Any, inputs: Inputs, answer: list[int], **more: Any) -> torch.Tensor:
    return own(**extended(inputs, answer), **more).logits[0, -1]


def plain(next_scores: Callable[[list[int]], torch.Tensor], ends: list[int]) -> list[int]:
    """Greedy decoding, one token after another."""
    answer: list[int] = []
    while len(answer) < LIMIT:
        token = int(next_scores(answer).argmax())
        if token in ends:
            break
        answer.append(token)
    return answer


def constrained(scores: torch.Tensor, first: torch.Tensor, beta: float) -> torch.Tensor:
    probability = first.softmax(-1)
    return torch.where(probability >= beta * probability.max(), scores, -torch.inf)


def plain_vcd(asked: Asked, sample: Sample, method: VCD) -> Callable[[list[int]], torch.Tensor]:
    inputs = own_inputs(asked.model, sample)
    if not sample.images:
        return lambda answer: logits(asked.own, inputs, answer)
    betas = torch.linspace(-6, 6, 1000).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    left = torch.cumprod(1 - betas, 0)[method.noise_step]
    alone = collate(asked.model, asked.student, [sample], with_answer=False)
    noise = noise_of(alone.student_pixels, [sample.key] * len(sample.images), 0)
    noised = left.sqrt() * alone.student_pixels + (1 - left).sqrt() * noise
    second = inputs | asked.student.spec.family.inputs(asked.student.spec, alone, noised)

    def scores(answer: list[int]) -> torch.Tensor:
        first, other = logits(asked.own, inputs, answer), logits(asked.own, second, answer)
        return constrained((1 + method.alpha) * first - method.alpha * other, first, method.beta)

    return scores


def plain_m3id(asked: Asked, sample: Sample, method: M3ID) -> Callable[[list[int]], torch.Tensor]:
    inputs = own_inputs(asked.model, sample)
    second = without(inputs, asked.student.spec.image_token_id)

    def scores(answer: list[int]) -> torch.Tensor:
        first = logits(asked.own, inputs, answer)
        if not sample.images:
            return first
        with_image, other = first.log_softmax(-1), logits(asked.own, second, answer).log_softmax(-1)
        if with_image.exp().max() >= method.threshold:
            return with_image
        forgotten = math.exp(-method.decay * (len(answer) + 1))
        corrected = with_image + (1 - forgotten) / forgotten * (with_image - other)
        return constrained(corrected, first, method.beta) if method.beta else corrected

    return scores


def plain_avisc(asked: Asked, sample: Sample, method: AvisC) -> Callable[[list[int]], torch.Tensor]:
    inputs = own_inputs(asked.model, sample)
    if not sample.images:
        return lambda answer: logits(asked.own, inputs, answer)
    image = inputs["input_ids"][0] == asked.student.spec.image_token_id
    with torch.no_grad():
        layers = [each[0].mean(0)[-1][image] for each in asked.own(**inputs, output_attentions=True).attentions]
    total, shares, chosen = sum(float(each.sum()) for each in layers), 0.0, []
    for block in sorted(range(len(layers)), key=lambda block: -float(layers[block].sum())):
        if not chosen or shares < method.gamma:
            chosen.append(layers[block])
        shares += float(layers[block].sum()) / total
    attention = torch.stack(chosen).mean(0)
    blanked = image.clone()
    blanked[image] = attention < attention.mean() + method.deviations * attention.std()
    assert 0 < blanked.sum() < image.sum()

    def second(answer: list[int]) -> torch.Tensor:
        """The language model reads zeros, and adds nothing to them later (Qwen3-VL)."""

        def blank(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            embeddings = kwargs["inputs_embeds"].clone()
            embeddings[0, : len(blanked)][blanked] = 0
            added = kwargs.get("deepstack_visual_embeds")
            if added is not None:
                kwargs = kwargs | {"deepstack_visual_embeds": [each * ~blanked[image][:, None] for each in added]}
            return args, kwargs | {"inputs_embeds": embeddings}

        hook = asked.own.model.language_model.register_forward_pre_hook(blank, with_kwargs=True)
        found = logits(asked.own, inputs, answer)
        hook.remove()
        return found

    def scores(answer: list[int]) -> torch.Tensor:
        first = logits(asked.own, inputs, answer)
        return constrained((1 + method.alpha) * first - method.alpha * second(answer), first, method.beta)

    return scores


def plain_damro(asked: Asked, sample: Sample, method: DAMRO) -> Callable[[list[int]], torch.Tensor]:
    """The prompt is written again, with fewer image tokens, whose features replace their embeddings."""
    inputs = own_inputs(asked.model, sample)
    if not sample.images:
        return lambda answer: logits(asked.own, inputs, answer)
    tower, features = asked.own.model.vision_tower, []
    blocks = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
    for pixels in inputs["pixel_values"]:
        with torch.no_grad():
            found = tower(pixels[None], output_hidden_states=True)
            block = blocks[method.tower_block]
            dinov2 = hasattr(block, "attention")
            norm, attention = (block.norm1, block.attention) if dinov2 else (block.layer_norm1, block.self_attn)
            normed = norm(found.hidden_states[method.tower_block - 1])
            query, key = attention.q_proj(normed)[0, 0], attention.k_proj(normed)[0]
            parts = 1 if method.heads == "joint" else tower.config.num_attention_heads
            rows = [k @ q / len(q) ** 0.5 for q, k in zip(query.chunk(parts), key.chunk(parts, dim=1), strict=True)]
            weights = torch.stack([row.softmax(0) for row in rows]).mean(0)[1:]
            top = sorted(range(len(weights)), key=lambda patch: -float(weights[patch]))[: method.top]
            projected = asked.own.model.get_image_features(pixel_values=pixels[None]).pooler_output[0]
            features.append(projected[top if method.order == "attention" else sorted(top)])
    ids, image = inputs["input_ids"][0].tolist(), asked.student.spec.image_token_id
    starts = [place for place, token in enumerate(ids) if token == image and ids[place - 1] != image]
    assert len(starts) == len(features)

    def second(answer: list[int]) -> torch.Tensor:
        embed, parts, place = asked.own.get_input_embeddings(), [], 0
        for start, vectors in zip(starts, features, strict=True):
            parts += [embed(torch.tensor(ids[place:start])), vectors]
            place = start + asked.student.spec.image.count
        parts.append(embed(torch.tensor([*ids[place:], *answer])))
        with torch.no_grad():
            return asked.own(inputs_embeds=torch.cat(parts)[None]).logits[0, -1]

    def scores(answer: list[int]) -> torch.Tensor:
        first = logits(asked.own, inputs, answer)
        return constrained((1 + method.alpha) * first - method.alpha * second(answer), first, method.beta)

    return scores


def rotated(vectors: torch.Tensor, places: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Vectors [..., L, D] turned by a position each, as complex numbers whose parts are the halves."""
    half = vectors.shape[-1] // 2
    numbers = torch.complex(vectors[..., :half], vectors[..., half:])
    numbers = numbers * torch.polar(torch.ones(()), places[:, None] * frequencies)
    return torch.cat([numbers.real, numbers.imag], -1)


def plain_imccd(asked: Asked, sample: Sample, method: IMCCD) -> Callable[[list[int]], torch.Tensor]:
    """Image tokens get the position of the first one, and the text after them the following ones.

    The thresholds of the prompt's text and of each token of the answer are apart, as they are with a cache.
    """
    inputs = own_inputs(asked.model, sample)
    if not sample.images:
        return lambda answer: logits(asked.own, inputs, answer)
    ids, token = inputs["input_ids"][0].tolist(), asked.student.spec.image_token_id
    image = [place for place, one in enumerate(ids) if one == token]
    count = len(image) // len(sample.images)
    runs = [image[start : start + count] for start in range(0, len(image), count)]
    blocks = {id(each.self_attn): number for number, each in enumerate(asked.own.model.language_model.layers)}
    frequencies = asked.own.model.language_model.rotary_emb.inv_freq
    source = sys.modules[type(asked.own.model.language_model.layers[0].self_attn).__module__]
    original = source.eager_attention_forward

    def attention(distorted: bool) -> Any:
        def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any) -> Any:
            if id(module) not in blocks:
                return original(module, query, key, value, mask, scaling=scaling, **rest)
            length = query.shape[2]
            key, value = (part[0].repeat_interleave(query.shape[1] // key.shape[1], 0) for part in (key, value))
            own, last = torch.arange(length).float(), image[-1]
            scores = query[0] @ key.transpose(1, 2) * scaling
            if blocks[id(module)] < method.refined_blocks:
                bare = [rotated(part, -own, frequencies) for part in (query[0], key)]
                for run in runs:
                    places = own.clone()
                    places[run] = run[0]
                    places[run[-1] + 1 :] -= run[-1] - run[0]
                    near = rotated(bare[0], places, frequencies) @ rotated(bare[1], places, frequencies).transpose(1, 2)
                    for row in range(last + 1, length):
                        mixed = (1 - method.gamma) * scores[:, row, run] + method.gamma * scaling * near[:, row, run]
                        scores[:, row, run] = mixed
            weights = (scores + mask[0]).softmax(-1)
            output = weights @ value
            for rows in [range(last + 1, len(ids)), *([row] for row in range(len(ids), length))] if distorted else []:
                large = scores[:, rows][:, :, image] > scores[:, rows][:, :, image].mean()
                for head in range(len(scores)):
                    other = value[head].clone()
                    for number, row in enumerate(rows):
                        lost = torch.tensor(image)[large[head, number]]
                        other[lost] = value[head, image].mean()
                        output[head, row] = weights[head, row] @ other
                        other[lost] = value[head, lost]
            return output.transpose(0, 1)[None], None

        return attend

    def view(answer: list[int], distorted: bool) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source, "eager_attention_forward", attention(distorted))
            return logits(asked.own, inputs, answer)

    def scores(answer: list[int]) -> torch.Tensor:
        first = view(answer, False)
        return constrained((1 + method.alpha) * first - method.alpha * view(answer, True), first, method.beta)

    return scores


def plain_dola(asked: Asked, sample: Sample, method: DoLa) -> Callable[[list[int]], torch.Tensor]:
    inputs = own_inputs(asked.model, sample)
    norm, head = asked.own.model.language_model.norm, asked.own.get_output_embeddings()
    candidates = {"low": [0], "high": [1]}[method.bucket]  # of three blocks

    def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first * (first / second).log()).nan_to_num(0).sum()

    def scores(answer: list[int]) -> torch.Tensor:
        more = extended(inputs, answer)
        with torch.no_grad():
            output = asked.own(**more, output_hidden_states=True)
            first = output.logits[0, -1]
            early = [head(norm(output.hidden_states[block][0, -1])) for block in candidates]
        last, distances = first.softmax(-1), []
        for other in (each.softmax(-1) for each in early):
            mean = (last + other) / 2
            terms = ((mean, last), (mean, other)) if method.divergence == "reversed" else ((last, mean), (other, mean))
            distances.append(sum(kl(*pair) for pair in terms) / 2)
        chosen = early[int(torch.tensor(distances).argmax())]
        found = constrained(first.log_softmax(-1) - chosen.log_softmax(-1), first, method.beta)
        for token in set(more["input_ids"][0].tolist()):
            found[token] *= method.repetition_penalty if found[token] < 0 else 1 / method.repetition_penalty
        return found

    return scores


DOLA_HIGH = DoLa(bucket="high", divergence="jensen_shannon", beta=0.01, repetition_penalty=1.0)
METHODS: list[tuple[Method, Any]] = [
    (VCD(), plain_vcd),
    (VCD(alpha=2.0, beta=0.2, noise_step=900), plain_vcd),
    (M3ID(decay=0.3), plain_m3id),
    (M3ID(decay=0.5, beta=0.0, threshold=0.9), plain_m3id),
    (AvisC(alpha=2.0), plain_avisc),
    (AvisC(gamma=0.9, deviations=0.2, alpha=1.5), plain_avisc),
    (DAMRO(top=5), plain_damro),
    (DAMRO(top=3, heads="mean", order="place", tower_block=-1), plain_damro),
    (IMCCD(), plain_imccd),
    (IMCCD(alpha=1.0, beta=0.01, gamma=0.9, refined_blocks=2), plain_imccd),
    (DoLa(), plain_dola),
    (DOLA_HIGH, plain_dola),
]


REFUSED = {  # families that a method cannot work with
    "damro": ("needs a class token that attends to the image tokens", ("qwen2_5_vl", "gemma3", "qwen3_vl")),
    "imccd": ("needs a student with one rotation per token", ("qwen2_5_vl", "gemma3", "qwen3_vl")),
    "dola": ("none of the student's 3 blocks is a candidate there; choose high", ("gemma3",)),  # tied
}


@pytest.mark.parametrize(("method", "written"), METHODS, ids=lambda value: getattr(value, "name", ""))
def test_tokens_equal_those_of_the_paper(asked: Asked, method: Method, written: Any) -> None:
    """In a batch with images, several and none, with left padding, a cache and SDPA."""
    message, families = REFUSED.get(method.name, ("", ()))
    refused = asked.student.spec.family.model_type in families and method != DOLA_HIGH
    if refused:
        with pytest.raises(ConfigError, match=message):
            method.check(asked.student.spec, asked.model.config)
        return
    method.check(asked.student.spec, asked.model.config)
    compare(asked, method, written)


def compare(asked: Asked, method: Method, written: Any) -> None:
    found = asked.answers(method)
    for sample, answer in zip(asked.samples, found, strict=True):
        assert answer == plain(written(asked, sample, method), asked.student.end_tokens), sample.question
    assert found != asked.answers(Decoding().method), "the method has no effect here"


def test_damro_reads_a_tower_of_dinov2(tmp_path: Path) -> None:
    compare(ask("llava_dinov2", tmp_path), DAMRO(top=5), plain_damro)


@pytest.mark.parametrize("question", ["after the image", "before the image"])
@pytest.mark.parametrize("mixture", [False, True], ids=["W", "W and mixture"])
def test_what_the_second_view_of_imccd_does_not_read_is_that_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixture: bool, question: str
) -> None:
    """The scores are those of a second view that reads everything, but for rounding in products of other shapes: 1e-6.

    The sample without an image is not contrasted.
    """
    asked = ask("llava", tmp_path)
    trained = student_of(asked.model, trained=True, query_mixture=mixture)
    before_BL = (asked.batch.image_index >= 0).cumsum(1) == 0
    batch = asked.batch
    if question == "before the image":
        batch = replace(batch, question_mask=batch.attention_mask & before_BL)
    starts, found = [], []
    start = _Prompts.start
    for read in (start, lambda _: 0):
        monkeypatch.setattr(_Prompts, "start", lambda prompts, read=read: starts.append(read(prompts)) or starts[-1])
        monkeypatch.setattr(IMCCD, "combine", lambda _, *views: found.append(torch.cat(views[:2])) or views[0])
        trained_ids, _ = IMCCD().generate(trained, batch, Decoding(LIMIT), pad_token_id=0, eos_token_id=None)
        found.append(trained_ids)
    length = batch.input_ids.shape[1]
    assert starts[1] == 0 and (0 < starts[0] < length / 2 if question[0] == "b" and mixture else starts[0] > length / 2)
    contrasted = torch.tensor([0, 1, 3, 4, 5, 7])
    half = len(found) // 2
    for short, whole in zip(found[:half], found[half:], strict=True):
        rows = contrasted if len(short) == 8 else slice(None)
        torch.testing.assert_close(short[rows], whole[rows], rtol=1e-6, atol=1e-6)
    first, second = found[half].chunk(2)
    assert (first - second).abs()[torch.tensor([0, 1, 3])].amax(-1).min() > 1e-3, "the views do not differ"


@pytest.mark.parametrize("method", [VCD(alpha=2.0), M3ID(decay=0.3)], ids=lambda method: method.name)
def test_an_answer_depends_only_on_seed_and_sample(asked: Asked, method: Method) -> None:
    # Of 32,000 tokens that are nearly alike, rounding would choose.
    temperature = 0.05 if len(asked.model.processor.tokenizer) == 32000 else 1.5
    settings = {"do_sample": True, "top_p": 0.9, "temperature": temperature, "seed": 3}
    together = asked.answers(method, **settings)
    assert [asked.answers(method, slice(i, i + 1), **settings)[0] for i in range(4)] == together
    assert asked.answers(method, **settings | {"seed": 4}) != together
    assert together[2] == asked.answers(Decoding().method, **settings)[2], "a sample without an image has no contrast"


def test_the_map_is_that_of_the_first_view(asked: Asked) -> None:
    """Sums over rows of another padding have another order: 1e-5."""
    tokens = {"pad_token_id": 0, "eos_token_id": asked.student.end_tokens}
    maps = []
    family = asked.student.spec.family.model_type
    others = (VCD(), M3ID(), AvisC(), *([] if family in REFUSED["imccd"][1] else [IMCCD(gamma=0)]))
    for method in (Decoding().method, *others):
        maps.append(method.generate(asked.student, asked.batch, Decoding(2, method=method), **tokens)[1])
    for found in maps[1:]:
        torch.testing.assert_close(found, maps[0], rtol=1e-5, atol=1e-7)


def test_a_batch_without_images_has_no_second_view(asked: Asked) -> None:
    text = slice(2, 3)
    assert asked.answers(VCD(), text) == asked.answers(Decoding().method, text)


def test_views_are_joined_row_by_row(asked: Asked) -> None:
    joined = join_views(asked.batch, without_images(asked.batch))
    first, second = joined.input_ids.chunk(2)
    assert torch.equal(first, asked.batch.input_ids) and len(joined.student_pixels) == 4
    for row, kept in enumerate(asked.batch.attention_mask & (asked.batch.image_index < 0)):
        assert torch.equal(second[row][joined.attention_mask[4 + row]], asked.batch.input_ids[row][kept])
    twice = join_views(asked.batch, asked.batch)
    assert twice.image_sample.tolist() == [0, 1, 1, 3, 4, 5, 5, 7]
    index = asked.batch.image_index
    assert torch.equal(twice.image_index[4:], torch.where(index >= 0, index + 4, -1))


def test_noise_is_normal_and_differs_by_image_and_key() -> None:
    noise = noise_of(torch.zeros(3, 3, 64, 64), ["a", "a", "b"], 0)
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02  # 37,000 numbers: 0.005 expected
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    assert torch.equal(noise_of(torch.zeros(1, 3, 64, 64), ["b"], 0)[0], noise[2])
    assert not torch.equal(noise_of(torch.zeros(1, 3, 64, 64), ["b"], 1)[0], noise[2])
    assert 1 > signal_left(0) > signal_left(500) > signal_left(999) > 0


def test_a_weight_that_would_overflow_leaves_finite_scores():
    first, second = torch.tensor([[1.0, 0.0, -9.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    scores = M3ID(decay=1e6, beta=0.0).combine(first, second, 999)
    assert scores.isfinite().all() and scores.argmax() == 0
