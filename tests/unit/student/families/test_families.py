"""Every family: the same logits, map and answers as the model's own processor and class in transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from medalign.__main__ import main
from medalign.checkpoint import export
from medalign.config import LossConfig, StudentConfig
from medalign.config import load as load_config
from medalign.contracts import IGNORE, Batch, Sample
from medalign.data.batches.collator import Collator
from medalign.data.batches.prompts import PromptEncoder
from medalign.errors import ConfigError
from medalign.losses import Objective, build_terms
from medalign.pipeline import build_collator
from medalign.student.checks import check_student
from medalign.student.loading import load_student
from medalign.student.model import Student, check_causality
from medalign.student.weights import load_model
from medalign.teacher.loading import load_teacher
from medalign.teacher.targets import teacher_targets
from tests.unit.student.families.cases import CASES, Case

QUESTIONS = (("Is the heart large?", 1), ("Compare both films.", 2), ("What is a nodule?", 0))


class Model(NamedTuple):
    """A model on disk, its settings, its processor, and three samples of one, two and no images."""

    case: Case
    folder: Path
    config: StudentConfig
    processor: Any
    samples: list[Sample]


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    case = CASES[request.param]
    folder = case.save(tmp_path_factory.mktemp("families") / request.param)
    config = case.config(folder)
    spec, processor = check_student(config)
    draw = np.random.default_rng(0)
    shape = (spec.image_size, spec.image_size, 3)  # no processor has to resize it
    images = [Image.fromarray(draw.integers(64, 192, shape, dtype=np.uint8)) for _ in range(3)]
    samples = [
        Sample(f"s{i}", "shard", "vqa", question, "Yes, it is.", "open", tuple(images[i : i + count]))
        for i, (question, count) in enumerate(QUESTIONS)
        if count <= (spec.family.max_images or count)
    ]
    return Model(case, folder, config, processor, samples)


def student_of(model: Model, *, trained: bool = False, **changes: Any) -> Student:
    student = load_student(replace(model.config, **changes), torch.float32).eval()
    if trained:  # adapters and W are initialized so that they change nothing
        torch.manual_seed(1)
        for named in student.trainable().values():
            for _, parameter in named:
                torch.nn.init.normal_(parameter, std=0.02)
    return student


def collate(model: Model, student: Student, samples: list[Sample], **settings: Any) -> Batch:
    view = student.spec.preprocess_cfg(model.processor)
    encoder = PromptEncoder(model.processor, image=student.spec.image, max_length=1000, max_images=2)
    return Collator(encoder, view, settings.pop("teacher", None), **settings)(samples)


def own_inputs(model: Model, sample: Sample) -> dict[str, torch.Tensor]:
    """What the model's own processor makes of a question."""
    content = [
        *({"type": "image", "image": image} for image in sample.images),
        {"type": "text", "text": sample.question},
    ]
    inputs = dict(
        model.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **model.case.processor,
        )
    )
    if model.case.tiled and sample.images:
        # It rounds the whole picture to 8 bits, the student does not: test_native compares the two.
        tiles = inputs["pixel_values"][:, 1:].unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        whole = F.interpolate(tiles, inputs["pixel_values"].shape[-2:], mode="bicubic", antialias=True)
        inputs["pixel_values"] = torch.cat([whole[:, None], inputs["pixel_values"][:, 1:]], dim=1)
    return inputs


def reference(model: Model) -> Any:
    """The model's own class with eager attention."""
    return load_model(str(model.folder), model.config, dtype=torch.float32, attn_implementation="eager").eval()


def all_supervised(batch: Batch) -> Batch:
    return replace(batch, labels=torch.where(batch.attention_mask, batch.input_ids, IGNORE))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32: the sums of SDPA and of eager attention, padded and not, differ in their order."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


LAYOUTS = ({"padding_side": "right"}, {"padding_side": "left"}, {"packed": True})


@pytest.mark.parametrize("layout", LAYOUTS, ids=["right", "left", "packed"])
def test_prompt_and_logits_equal_those_of_the_models_own_inputs(model: Model, layout: dict[str, Any]) -> None:
    student, own = student_of(model), reference(model)
    if layout.get("packed") and student.spec.family.no_packing:
        settings = load_config("phantom", ["--data.train", "none", "--data.packing", "true"], models=False)
        with pytest.raises(ConfigError, match="data.packing is true, but .*; set data.packing to false"):
            build_collator(settings, student.spec, model.processor, None, 1)
        return
    batch = collate(model, student, model.samples, with_answer=False, **layout)
    with torch.no_grad():
        output = student(all_supervised(batch))
    logits_BLV = torch.zeros(*batch.input_ids.shape, output.logits.shape[-1]).index_copy(1, output.kept, output.logits)
    for index, sample in enumerate(model.samples):
        places = (batch.sample_of_token() == index) & batch.attention_mask
        inputs = own_inputs(model, sample)
        assert batch.input_ids[places].tolist() == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            expected = own(**inputs).logits[0]
        close(logits_BLV[places][:-1], expected[:-1])


def test_a_cell_is_where_its_patch_of_the_picture_is(model: Model) -> None:
    """Each cell in turn shows another pattern. Towers mix patches, but a transposed grid hits only its diagonal."""
    spec = student_of(model).spec
    side, size = spec.grid.columns, spec.image_size // spec.grid.columns
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, spec.image_size, spec.image_size, generator=draw).repeat(1 + spec.grid.size, 1, 1, 1)
    pattern = torch.randn(3, size, size, generator=draw)
    for cell in range(spec.grid.size):
        top, left = size * (cell // side), size * (cell % side)
        pixels[1 + cell, :, top : top + size, left : left + size] = pattern
    with torch.no_grad():
        features_IND = spec.family.features(spec, pixels)
    if spec.image.cells:
        features_IND = features_IND[:, torch.tensor(spec.image.cells)]
    changes_IN = (features_IND[1:] - features_IND[:1]).norm(dim=-1)
    hits = (changes_IN.argmax(1) == torch.arange(spec.grid.size)).sum()
    assert hits > 0.5 * spec.grid.size


def test_no_logit_depends_on_a_later_token_or_another_sample(model: Model) -> None:
    student = student_of(model, trained=True)
    check_causality(student, collate(model, student, model.samples))
    if not student.spec.family.no_packing:
        check_causality(student, collate(model, student, model.samples, packed=True))


def test_the_map_is_the_mean_of_eager_attention(model: Model) -> None:
    student, own = student_of(model, steering=False), reference(model)
    batch = collate(model, student, model.samples, with_answer=False)
    with torch.no_grad():
        found = student(all_supervised(batch)).attention
    expected = []
    for index, sample in enumerate(model.samples[:-1]):
        with torch.no_grad():
            weights_HLL = own(**own_inputs(model, sample), output_attentions=True).attentions[model.config.layer][0]
        length = weights_HLL.shape[-1]
        row_L = weights_HLL.mean(0)[batch.question_mask[index, :length]].mean(0)
        expected += row_L[batch.cells[index, :length]].view(len(sample.images), -1).unbind()
    assert torch.stack(expected).sum() > 0.1
    close(found, torch.stack(expected))


def test_answers_equal_those_of_the_models_own_generation(model: Model) -> None:
    student, own = student_of(model), reference(model)
    batch = collate(model, student, model.samples, with_answer=False, padding_side="left")
    text_only = collate(model, student, model.samples[-1:], with_answer=False, padding_side="left")
    words = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids, attention = student.generate(batch, **words)
    for index, sample in enumerate(model.samples):
        inputs = own_inputs(model, sample)
        theirs = own.generate(**inputs, **words)[0, inputs["input_ids"].shape[1] :]
        assert ids[index].tolist() == theirs.tolist()
    alone, nothing = student.generate(text_only, **words)
    assert nothing is None and alone[0].tolist() == ids[-1].tolist()
    with torch.no_grad():
        close(attention, student(all_supervised(batch)).attention)


def append(batch: Batch, token: int) -> Batch:
    """The batch with one more token at the end of each row, at which alone there are logits."""
    size = (len(batch.input_ids), 1)
    fills = {"attention_mask": True, "question_mask": False, "image_index": -1, "input_ids": token}
    if batch.cell_mask is not None:
        fills["cell_mask"] = False
    rows = {name: getattr(batch, name) for name in fills}
    longer = {name: torch.cat([rows[name], torch.full(size, fill)], 1) for name, fill in fills.items()}
    return replace(batch, **longer, labels=torch.cat([torch.full_like(batch.input_ids, IGNORE), torch.ones(size)], 1))


def test_two_beams_find_what_a_search_by_hand_finds(model: Model) -> None:
    """Two tokens without an end: the best continuation of the two best first tokens, in a batch with other samples."""
    student = student_of(model, trained=True)
    batch = collate(model, student, model.samples, with_answer=False, padding_side="left")
    ids, _ = student.generate(batch, max_new_tokens=2, min_new_tokens=2, num_beams=2, do_sample=False, pad_token_id=0)

    def scores(asked: Batch) -> torch.Tensor:
        logits_V = student(append(asked, 97)).logits[0, -1]  # the appended token only gives a place to predict from
        return logits_V.log_softmax(-1).index_fill(0, torch.tensor(student.end_tokens), -torch.inf)

    for index, sample in enumerate(model.samples):
        asked = collate(model, student, [sample], with_answer=False)
        with torch.no_grad():
            first_V = scores(asked)
            best = first_V.topk(2).indices.tolist()
            sums = torch.stack([first_V[token] + scores(append(asked, token)) for token in best])
        place = int(sums.argmax())
        expected = [best[place // sums.shape[1]], place % sums.shape[1]]
        assert ids[index].tolist() == expected


def test_the_prompt_of_training_is_that_of_generation(model: Model) -> None:
    student = student_of(model)
    encoder = PromptEncoder(model.processor, image=student.spec.image, max_length=1000, max_images=2)
    for sample in model.samples:
        asked, taught = (encoder.encode(sample, with_answer=answer) for answer in (False, True))
        assert taught.input_ids[: len(asked.input_ids)] == asked.input_ids
        assert taught.labels[len(asked.input_ids) :] == taught.input_ids[len(asked.input_ids) :]
        assert taught.input_ids[-1] == encoder.end_token_id


@pytest.mark.parametrize("images", [True, False])
def test_a_step_with_both_losses_reaches_every_part(model: Model, teacher_folder: Path, images: bool) -> None:
    """Without an image, every parameter still gets a gradient (of zero for W), or ZeRO-3 would wait for it."""
    student, teacher = student_of(model, trained=True, train_projector=True).train(), load_teacher(teacher_folder)
    samples = model.samples if images else model.samples[-1:]
    batch = collate(model, student, samples, teacher=teacher.preprocess_cfg)
    objective = Objective(build_terms(LossConfig(beta=0.5)))
    output = student(batch)
    targets = teacher_targets(teacher, batch.teacher_pixels, student.spec.grid)
    report = objective(
        output, targets, batch, {name: 1 / max(float(n), 1) for name, n in objective.counts(batch).items()}
    )
    report.total.backward()
    assert torch.isfinite(report.total)
    for group, named in student.trainable().items():
        gradients = [parameter.grad for _, parameter in named]
        assert all(gradient is not None for gradient in gradients), group
        moved = max(float(gradient.abs().max()) for gradient in gradients if gradient is not None)
        assert images == (moved > 0) or group == "adapters", group


def test_an_export_loads_with_equal_logits(model: Model, tmp_path: Path) -> None:
    student = student_of(model, trained=True)
    whole = {name: value.detach() for named in student.trainable().values() for name, value in named}
    export.write_export(student, whole, model.config, 1000, tmp_path)
    again = export.load_export(tmp_path, torch.float32, torch.device("cpu"))
    batch = all_supervised(collate(model, student, model.samples))
    with torch.no_grad():
        first, second = student(batch), again(batch)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.attention, second.attention)


def test_a_merged_export_is_a_folder_of_transformers(model: Model, tmp_path: Path) -> None:
    """It is loaded without this package, with its own processor, and gives the logits of the student."""
    student = student_of(model, trained=True, steering=False)
    whole = {name: value.detach() for named in student.trainable().values() for name, value in named}
    export.write_export(student, whole, replace(model.config, steering=False), 1000, tmp_path / "export")
    export.merge(tmp_path / "export", tmp_path / "merged")
    merged: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    batch = collate(model, student, model.samples[:1], with_answer=False)
    inputs = own_inputs(model._replace(processor=processor), model.samples[0])
    assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
    with torch.no_grad():
        close(merged(**inputs).logits[:, :-1], student(all_supervised(batch)).logits)


def test_a_merged_export_in_the_layout_of_the_authors(model: Model, tmp_path: Path) -> None:
    """The names and files are those of the base model; loaded again, it gives the logits of the student."""
    student = student_of(model, trained=True, steering=False)
    whole = {name: value.detach() for named in student.trainable().values() for name, value in named}
    export.write_export(student, whole, replace(model.config, steering=False), 1000, tmp_path / "export")
    words = ["export", str(tmp_path / "export"), "--output", str(tmp_path / "merged"), "--merge", "--layout", "authors"]
    if "mm_vision_tower" not in (model.folder / "config.json").read_text():
        assert main(words) == 2  # in the format of transformers already
        return
    assert main(words) == 0
    merged = tmp_path / "merged"
    before, after = (load_file(folder / "model.safetensors") for folder in (model.folder, merged))
    assert set(before) == set(after) and all(after[name].dtype == value.dtype for name, value in before.items())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all("layers" in name and name.endswith(".weight") for name in changed)
    assert {path.name for path in merged.iterdir()} == {path.name for path in model.folder.iterdir()} | {"README.md"}
    again = load_student(model.case.config(merged, steering=False), torch.float32).eval()
    batch = all_supervised(collate(model, student, model.samples))
    with torch.no_grad():
        close(again(batch).logits, student(batch).logits)


def drop(state: dict[str, torch.Tensor], name: str) -> None:
    del state[name]


def add(state: dict[str, torch.Tensor], name: str) -> None:
    state[f"{name}.of_another_model"] = torch.zeros(2)


def reshape(state: dict[str, torch.Tensor], name: str) -> None:
    state[name] = state[name][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "[12] of its weights are not in its safetensors files"),
        (add, "1 of their weights do not exist in the model"),
        (reshape, "1 of its weights do not have the shape"),
    ],
)
@pytest.mark.parametrize("part", ["first", "last"])
def test_weights_that_do_not_fit_are_refused(
    model: Model, tmp_path: Path, change: Callable[..., None], message: str, part: str
) -> None:
    for path in model.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    state = load_file(model.folder / "model.safetensors")
    change(state, sorted(state)[0 if part == "first" else -1])
    (tmp_path / "model.safetensors").unlink()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = model.case.config(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_student(config)
    with pytest.raises(ConfigError, match=message):
        load_student(config, torch.float32)
