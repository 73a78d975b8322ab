"""SECOND equals one written from its paper and code: one sample, no cache, eager attention, the model's own class."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import MistralConfig

from medalign.config import StudentConfig
from medalign.contracts import Batch, Sample
from medalign.decoding.base import Decoding
from medalign.decoding.methods.second import SECOND
from medalign.decoding.scale_reader import ScaleReader
from medalign.errors import ConfigError
from medalign.geometry import PatchGrid
from medalign.student.checks import check_student
from medalign.student.loading import load_student
from medalign.student.model import Student
from tests import tiny
from tests.unit.decoding.test_contrast import LIMIT, Asked, ask, compare, logits
from tests.unit.student.families.cases import CASES, Case
from tests.unit.student.families.test_families import collate, own_inputs, student_of

STRICT = SECOND(strictness=60.0)  # so that some tokens are selected and others are not: random weights look everywhere
MAP = SECOND(strictness=60.0, entropy="map", alpha=1.5, beta=0.3, top=3)
ONCE = replace(STRICT, reselect=False)


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """A student with a grid of 8 x 8 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, "fine", Case(partial(tiny.save_student, image_size=64)))
        return ask("fine", tmp_path_factory.mktemp("second"))


def resized_tower(tower: Any, side: int) -> Any:
    """A copy whose table of positions is that of a smaller grid."""
    tower = copy.deepcopy(tower)
    embeddings = tower.embeddings
    dinov2 = not hasattr(embeddings, "position_embedding")
    table = embeddings.position_embeddings.data[0] if dinov2 else embeddings.position_embedding.weight.data
    own = int(len(table) ** 0.5)
    first, patches = table[: len(table) - own * own], table[len(table) - own * own :]
    grid = F.interpolate(patches.view(1, own, own, -1).permute(0, 3, 1, 2), (side, side), mode="bilinear")
    small = torch.cat([first, grid[0].permute(1, 2, 0).reshape(side * side, -1)])
    if dinov2:
        embeddings.position_embeddings = torch.nn.Parameter(small[None])
    else:
        embeddings.position_embedding = torch.nn.Embedding.from_pretrained(small)
        embeddings.position_ids = torch.arange(len(small))[None]
        embeddings.image_size = side * embeddings.patch_size
        embeddings.num_patches = embeddings.num_positions = side * side  # SigLIP looks at them
    return tower


@torch.no_grad()
def seen(asked: Asked, pixels: torch.Tensor, divisor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of an image at one scale, [N, D], and the attention between its patches, [N, N]."""
    config = asked.own.config
    size = pixels.shape[-1] // divisor
    side = size // config.vision_config.patch_size
    small = F.interpolate(pixels[None], size=(size, size), mode="bilinear", align_corners=False)
    tower = asked.own.model.vision_tower
    tower = tower if divisor == 1 else resized_tower(tower, side)
    found = tower(small, output_hidden_states=True, output_attentions=True)
    layer = config.vision_feature_layer
    features = asked.own.model.multi_modal_projector(found.hidden_states[layer])[0, -side * side :]
    used = found.attentions[: layer + 1 if layer < 0 else layer] if layer != -1 else found.attentions
    rows = [each[0].mean(0)[-side * side :, -side * side :] for each in used]
    return features, torch.stack([row / row.sum(-1, keepdim=True) for row in rows]).mean(0)


def scales_of(asked: Asked, pixels: torch.Tensor, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Both at all scales of an image. With tiles, [V, C, s, s], the last scale is their features side by side."""
    if pixels.ndim == 3:
        return [seen(asked, pixels, 2**step) for step in range(count - 1, -1, -1)]
    whole, *tiles = pixels
    parts = [seen(asked, tile, 1)[0] for tile in tiles]
    side = int(len(parts[0]) ** 0.5)
    squares = [part.view(side, side, -1) for part in parts]
    rows = [torch.cat(squares[:2], 1), torch.cat(squares[2:], 1)]
    coarse = [seen(asked, whole, 2**step) for step in range(count - 2, -1, -1)]
    return [*coarse, (torch.cat(rows).flatten(0, 1), torch.empty(0))]


def next_mask(total: list[list[float]], method: SECOND) -> list[list[bool]]:
    """Which places of the last grid the next scale reads, from the sum of the maps."""
    side = len(total)
    rows = [[value for row in total for value in row]] if method.entropy == "map" else total
    entropies = []
    for row in rows:
        shares = [value / sum(row) + 1e-9 for value in row]
        entropies.append(-sum(share * math.log(share) for share in shares))
    entropy = sum(entropies) / len(rows) / math.log(len(rows[0]))
    share = (math.exp(method.strictness * entropy) - 1) / (math.exp(method.strictness) - 1)
    count = max(1, int(side * side * min(1.0, max(0.1, share))))
    least = sorted((value for row in total for value in row), reverse=True)[count - 1]
    return [[value >= least for value in row] for row in total]


def plain_second(asked: Asked, sample: Sample, method: SECOND) -> Callable[[list[int]], torch.Tensor]:
    inputs = own_inputs(asked.model, sample)
    if not sample.images:
        return lambda answer: logits(asked.own, inputs, answer)
    images = [scales_of(asked, pixels, method.scales) for pixels in inputs["pixel_values"]]
    side = int(len(images[0][-1][0]) ** 0.5)
    ids, token = inputs["input_ids"][0].tolist(), asked.student.spec.image_token_id
    starts = [place for place, one in enumerate(ids) if one == token and ids[place - 1] != token]
    length = asked.student.spec.image.count
    first: list[list[list[list[bool]]]] = []  # the masks of each image when the answer is empty
    embed = asked.own.get_input_embeddings()

    @torch.no_grad()
    def scores(answer: list[int]) -> torch.Tensor:
        masks = [[[[True] * side] * side] for _ in images]  # of each image and scale
        found = []
        for stage in range(method.scales):
            parts, place, at, spans = [], 0, 0, []
            for image, start in enumerate(starts):
                parts.append(embed(torch.tensor(ids[place:start], dtype=torch.long)))
                at += len(parts[-1])
                for scale in range(stage + 1):
                    features, _ = images[image][scale]
                    grid = int(len(features) ** 0.5)
                    step = side // grid
                    mask = masks[image][scale]
                    kept = [n for n in range(grid * grid) if mask[n // grid * step][n % grid * step]]
                    parts.append(features[kept])
                    spans.append((image, scale, kept, range(at, at + len(kept))))
                    at += len(kept)
                place = start + length
            parts.append(embed(torch.tensor([*ids[place:], *answer], dtype=torch.long)))
            output = asked.own(inputs_embeds=torch.cat(parts)[None], output_attentions=True)
            found.append(output.logits[0, -1])
            if stage == method.scales - 1:
                break
            if first and not method.reselect:
                for image, mask in zip(masks, first, strict=True):
                    image.append(mask[stage + 1])
                continue
            rows = [each[0].mean(0)[-1].clone() for each in output.attentions]
            for row in rows:
                row[0] = 0
            row = torch.stack([row / row.sum() for row in rows]).mean(0)
            totals = [[[0.0] * side for _ in range(side)] for _ in images]
            for image, scale, kept, span in spans:
                features, between = images[image][scale]
                grid = int(len(features) ** 0.5)
                weights = row[list(span)] / row[list(span)].sum()
                values = sum(weight * between[n] for weight, n in zip(weights, kept, strict=True))
                values = (values / values.max()).tolist()
                for y in range(side):
                    for x in range(side):
                        if masks[image][scale][y][x]:
                            totals[image][y][x] += 4**scale * values[y * grid // side * grid + x * grid // side]
            for image, total in enumerate(totals):
                masks[image].append(next_mask(total, method))
        first[:] = first or masks
        read = sum(sum(map(sum, mask)) for image in masks for mask in image[1:])
        COUNTS.append(read / (len(images) * (method.scales - 1) * side * side))
        final = found[-1].clone()
        weights = {2: [method.alpha], 3: [method.beta, method.alpha], 4: [method.gamma, method.beta, method.alpha]}
        for weight, coarse, finer in zip(weights[method.scales], found[:-1], found[1:], strict=True):
            final += weight * (finer - coarse)
        allowed = found[-1].topk(min(method.top, len(final))).indices
        return torch.full_like(final, -torch.inf).scatter(0, allowed, final[allowed])

    return scores


COUNTS: list[float] = []  # shares of the tokens that the plain one read at the scales after the first


@pytest.mark.parametrize(
    "method",
    [STRICT, MAP, SECOND(scales=2, strictness=30.0), SECOND(scales=4, strictness=60.0, gamma=0.2), ONCE, SECOND()],
)
def test_tokens_equal_those_of_the_paper_and_code(fine: Asked, method: SECOND) -> None:
    """In a batch with images, several and none, with left padding and SDPA."""
    COUNTS.clear()
    method.check(fine.student.spec, fine.model.config)
    compare(fine, method, plain_second)
    share = sum(COUNTS) / len(COUNTS)
    assert 0.1 <= share < (1 if method == SECOND() else 0.8), share


@pytest.mark.parametrize("name", ["llava_mistral", "llava_siglip", "llava_dinov2", "llava_next"])
def test_towers_of_every_kind(tmp_path: Path, name: str) -> None:
    asked = ask(name, tmp_path)
    method = SECOND(scales=2, strictness=30.0)
    method.check(asked.student.spec, asked.model.config)
    compare(asked, method, plain_second)
    if name == "llava_next":  # the tiles, the image as a whole, and half of it
        compare(asked, SECOND(strictness=30.0), plain_second)


def test_w_and_mixture_act_in_passes_with_a_cache_as_in_prompts(fine: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all tokens are read, selecting once or for each new token is the same: 1e-5, sums have other orders."""
    student = student_of(fine.model, trained=True, query_mixture=True)
    batch = collate(fine.model, student, fine.samples, with_answer=False, padding_side="left")
    monkeypatch.setattr(SECOND, "select", lambda _, maps: torch.ones_like(maps, dtype=torch.bool))
    found: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    combine = SECOND.combine
    for method in (SECOND(reselect=True), SECOND(reselect=False)):
        seen: list[torch.Tensor] = []
        with monkeypatch.context() as patch:
            patch.setattr(SECOND, "combine", lambda *args, seen=seen: seen.extend(args[1]) or combine(*args))
            ids, _ = method.generate(student, batch, Decoding(LIMIT), pad_token_id=0, eos_token_id=None)
        found.append((ids, seen))
    (again, all_again), (once, all_once) = found
    assert torch.equal(again, once) and len(all_again) == len(all_once) == 3 * LIMIT
    for first, second in zip(all_again, all_once, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    plain = student_of(fine.model, trained=True, query_mixture=True, steering=False)
    bare, _ = SECOND().generate(plain, batch, Decoding(LIMIT), pad_token_id=0, eos_token_id=None)
    assert not torch.equal(bare, again), "W has no effect"


@dataclass
class Passes:
    """Counts the prompts of a generation, and keeps the logits of all scales."""

    prompts: int
    logits: list[torch.Tensor]

    @classmethod
    def of(cls, student: Student, method: SECOND, batch: Batch, *, again: bool = False) -> tuple[torch.Tensor, Passes]:
        """Generate; with `again`, all prompts are read again for each token."""
        found = cls(0, [])
        read, logits = Student.read, ScaleReader.logits

        def counted(self: Student, batch: Batch, *words: Any, **settings: Any) -> Any:
            found.prompts += len(batch.input_ids)
            return read(self, batch, *words, **settings)

        def kept(self: ScaleReader, *words: Any) -> torch.Tensor:
            found.logits.append(logits(self, *words).clone())
            return found.logits[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Student, "read", counted)
            patch.setattr(ScaleReader, "logits", kept)
            if again:
                changes = ScaleReader._changes

                def all_of_them(self: ScaleReader, attention: torch.Tensor, rows: list[int], answered: int) -> Any:
                    changes(self, attention, rows, answered)
                    return {0: list(range(len(batch.input_ids)))}

                patch.setattr(ScaleReader, "_changes", all_of_them)
            ids, _ = method.generate(student, batch, Decoding(LIMIT), pad_token_id=0, eos_token_id=None)
        return ids, found


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("changes", [True, False])
def test_what_the_cache_keeps_is_what_prompts_would_give(tmp_path: Path, changes: bool, window: int | None) -> None:
    """1e-5: sums have other orders. With a window, prompts are longer than what its blocks keep."""
    kind = {} if window is None else {"kind": MistralConfig, "sliding_window": window}
    folder = tiny.save_student(tmp_path / "student", image_size=64, **kind)
    student = load_student(StudentConfig(path=str(folder), layer=1), torch.float32).eval()
    batch = tiny.batch(side="left", texts=((9, 0), (3, 0), (6, 0)), tokens=64, size=64)
    method = SECOND() if changes else SECOND(strictness=20.0)
    ids, passes = Passes.of(student, method, batch)
    expected, every = Passes.of(student, method, batch, again=True)
    assert torch.equal(ids, expected) and len(passes.logits) == LIMIT
    for found, plain in zip(passes.logits, every.logits, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert every.prompts == 3 * 3 * LIMIT
    assert 3 * 3 < passes.prompts < every.prompts if changes else passes.prompts == 3 * 3


def test_a_sample_whose_first_selection_changes_and_one_whose_second_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same token: what is selected is drawn, and changes for some samples and scales with each token."""
    folder = tiny.save_student(tmp_path / "student", image_size=64)
    student = load_student(StudentConfig(path=str(folder), layer=1), torch.float32).eval()
    batch = tiny.batch(side="left", texts=tuple((count, 0) for count in (9, 3, 6, 7, 4, 8)), tokens=64, size=64)

    def drawn(_: ScaleReader, scale: int, images: Any, attention: torch.Tensor, answered: int) -> torch.Tensor:
        masks = []
        for image in range(6)[images] if isinstance(images, slice) else images:
            turn = (answered + image) // (3 - scale)
            draw = torch.Generator().manual_seed(100 * image + 10 * scale + turn)
            masks.append(torch.rand(2, 2, generator=draw).repeat_interleave(4, 0).repeat_interleave(4, 1) > 0.3)
            masks[-1][:4, :4] = True  # something is read of every scale
        return torch.stack(masks)

    monkeypatch.setattr(ScaleReader, "_next_scale", drawn)
    expected, every = Passes.of(student, SECOND(), batch, again=True)
    kinds: list[set[int]] = []
    changes = ScaleReader._changes

    def seen(*words: Any) -> dict[int, list[int]]:
        found = changes(*words)
        kinds.append(set(found))
        return found

    monkeypatch.setattr(ScaleReader, "_changes", seen)
    ids, passes = Passes.of(student, SECOND(), batch)
    assert {1, 2} in kinds
    assert torch.equal(ids, expected) and passes.prompts < every.prompts
    for found, plain in zip(passes.logits, every.logits, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)  # sums have other orders


@pytest.mark.parametrize("method", [STRICT, ONCE], ids=["again", "once"])
def test_an_answer_depends_only_on_seed_and_sample(fine: Asked, method: SECOND) -> None:
    settings = {"do_sample": True, "top_p": 0.9, "temperature": 1.5, "seed": 3}
    together = fine.answers(method, **settings)
    assert [fine.answers(method, slice(i, i + 1), **settings)[0] for i in range(4)] == together
    assert together[2] == fine.answers(Decoding().method, **settings)[2], "a sample without an image has no scales"


def test_the_map_is_the_attention_of_the_question_to_the_last_scale(fine: Asked, monkeypatch: Any) -> None:
    """Tokens that are not read have none. 1e-5: sums over rows of another padding have another order."""
    tokens = {"pad_token_id": 0, "eos_token_id": fine.student.end_tokens}
    _, strict = STRICT.generate(fine.student, fine.batch, Decoding(2), **tokens)
    unread = (strict == 0).sum(1)
    assert strict.shape == (4, 64) and (unread > 0).all() and (unread < 60).all()
    monkeypatch.setattr(SECOND, "select", lambda _, maps: torch.ones_like(maps, dtype=torch.bool))
    _, whole = SECOND().generate(fine.student, fine.batch, Decoding(2), **tokens)
    inputs, embed = own_inputs(fine.model, fine.samples[0]), fine.own.get_input_embeddings()
    ids = inputs["input_ids"][0]
    image = (ids == fine.student.spec.image_token_id).nonzero().flatten()
    with torch.no_grad():
        features = torch.cat([each for each, _ in scales_of(fine, inputs["pixel_values"][0], 3)])
        parts = [embed(ids[: image[0]]), features, embed(ids[image[-1] + 1 :])]
        attention = fine.own(inputs_embeds=torch.cat(parts)[None], output_attentions=True).attentions[2][0]
    end = int(image[0]) + len(features)
    expected = attention.mean(0)[end:, end - 64 : end].mean(0)
    torch.testing.assert_close(whole[0], expected, rtol=1e-5, atol=1e-8)


def test_what_it_cannot_read_is_refused(fine: Asked, tmp_path: Path) -> None:
    spec = fine.student.spec
    with pytest.raises(ConfigError, match="--decoding.second.gamma 0.1 has no effect with 3 scales"):
        SECOND(gamma=0.1)
    with pytest.raises(ConfigError, match="--decoding.second.beta 0.1 has no effect with 2 scales"):
        SECOND(scales=2, beta=0.1)
    odd = replace(spec, image=replace(spec.image, grid=PatchGrid(27, 27)))
    with pytest.raises(ConfigError, match="grid of 27 x 27 tokens cannot be halved 2 times; choose fewer scales"):
        SECOND().check(odd, fine.model.config)
    for name in ("qwen2_5_vl", "gemma3", "internvl"):
        config = CASES[name].config(CASES[name].save(tmp_path / name))
        other, _ = check_student(config)
        with pytest.raises(ConfigError, match="its image tokens are not the patches of its vision tower; choose anoth"):
            SECOND().check(other, config)


def test_a_prompt_whose_image_is_out_of_every_window_is_refused(tmp_path: Path) -> None:
    """Nothing could be selected by an attention of 0."""
    folder = tiny.save_student(tmp_path / "student", kind=MistralConfig, sliding_window=20)
    student = load_student(StudentConfig(path=str(folder), layer=1), torch.float32).eval()
    method = SECOND(scales=2)
    for question, reaches in ((10, True), (30, False)):
        batch = tiny.batch(side="left", texts=((question, 0),))
        answer = partial(method.generate, student, batch, Decoding(2), pad_token_id=0, eos_token_id=None)
        if reaches:
            assert answer()[0].shape == (1, 2)
            continue
        with pytest.raises(
            ConfigError, match=r"no block covers its image \(20 tokens at most\); choose another method"
        ):
            answer()
