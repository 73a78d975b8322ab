"""Real ranks under ZeRO-3: the result does not depend on how a batch is divided; frozen weights do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_worker
from tests.own_loss import COEFFICIENT

COMMON = {"steps": 3, "batch": 4}
OWN = {"extra": ["tests.own_loss.z_loss"]}
ONE_RANK = {
    "whole": {"micro": 4},
    "accumulated": {"micro": 1},
    "own term": {"micro": 4, **OWN},
    "own term accumulated": {"micro": 1, **OWN},
    "zero2": {"micro": 4, "engine": "zero2"},
    "two teachers": {"micro": 4, "two_teachers": True},
    "mixed": {"micro": 4, "text_only": [2, 3]},
    "still projector": {"micro": 4, "projector_lr": 0.0, "weight_decay": 0.5},
    # No image and no distillation: W and projector have gradient zero, and only weight decay could change them.
    "decay": {"micro": 4, "engine": "zero2", "steered": True, "weight_decay": 0.5, "text_only": [0, 1, 2, 3]},
    "falling": {"micro": 4, "steps": 12, "same": True},
    "bf16": {"micro": 4, "steps": 12, "same": True, "precision": "bf16"},
}
TWO_RANKS = {
    "halves": {"micro": 2},
    "own term": {"micro": 2, **OWN},
    "two teachers": {"micro": 2, "two_teachers": True},
    "mixed": {"micro": 2, "text_only": [2, 3]},
    "text": {"micro": 2, "text_only": [0, 1, 2, 3]},
    "packed": {"micro": 2, "packed": True, "text_only": [2, 3]},
}


def _launch(world: int, named: dict[str, Any], folder: Path, student: Path, teacher: Path) -> list[dict[str, Any]]:
    common = COMMON | {"student": str(student), "teacher": str(teacher)}
    return run_worker("scenarios", {"common": common, "scenarios": named}, world, folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory, student_folder, teacher_folder) -> dict[str, Any]:
    return _launch(1, ONE_RANK, tmp_path_factory.mktemp("one"), student_folder, teacher_folder)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory, student_folder, teacher_folder) -> list[dict[str, Any]]:
    return _launch(2, TWO_RANKS, tmp_path_factory.mktemp("two"), student_folder, teacher_folder)


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Compare losses and weights, whose float32 sums are in another order.

    The rounding is about 1e-7 of a loss, and more of the attention loss, where terms cancel. It does not grow over the
    updates: the weights agree to 1e-7.
    """
    for mine, other in zip(left["losses"], right["losses"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert left["learnt"] == pytest.approx(right["learnt"], rel=1e-6)


def test_two_ranks_equal_one(one, two):
    assert two[0]["halves"]["sharded"] > 10, "the weights were not partitioned, so this was not a ZeRO-3 run"
    assert_same(one["whole"], two[0]["halves"])


def test_accumulation_equals_one_micro_batch(one):
    assert_same(one["whole"], one["accumulated"])


def test_two_copies_of_a_teacher_with_half_of_the_losses_equal_one(one, two):
    """Each has its own terms; the sums, and so the gradients and the trained weights, are those of one teacher."""
    for both in (one["two teachers"], two[0]["two teachers"]):
        for mine, other in zip(both["losses"], one["whole"]["losses"], strict=True):
            for name in ("similarity", "attention"):
                assert mine[f"loss/{name}"] == mine[f"loss/{name}_2"]
                assert mine[f"loss/{name}"] == pytest.approx(other[f"loss/{name}"], rel=1e-5)
            for name in ("loss/total", "optim/grad_norm"):
                assert mine[name] == pytest.approx(other[name], rel=1e-5)
        assert both["learnt"] == pytest.approx(one["whole"]["learnt"], rel=1e-6)


def test_a_term_from_outside_the_package_is_trained(one):
    """It is logged, it is part of the total, and its gradient changes the trained weights."""
    own, without = one["own term"], one["whole"]
    first, before = own["losses"][0], without["losses"][0]
    assert first["loss/z_loss"] > 0
    assert {name: first[name] for name in before if name not in ("loss/total", "optim/grad_norm")} == {
        name: value for name, value in before.items() if name not in ("loss/total", "optim/grad_norm")
    }
    assert first["loss/total"] == pytest.approx(before["loss/total"] + COEFFICIENT * first["loss/z_loss"], rel=1e-6)
    assert first["optim/grad_norm"] != before["optim/grad_norm"]
    assert own["learnt"] != without["learnt"]


def test_a_term_from_outside_does_not_depend_on_how_the_batch_is_divided(one, two):
    assert_same(one["own term"], one["own term accumulated"])
    assert_same(one["own term"], two[0]["own term"])


def test_zero2_equals_zero3(one):
    assert_same(one["whole"], one["zero2"])


def test_frozen_weights_stay_bit_identical(two):
    result = two[0]["halves"]
    assert result["frozen"]["before"] == result["frozen"]["after"]
    assert any(".layers.2." in name for name in result["changed"])
    assert "steering.weight" in result["changed"]


def test_every_rank_reports_the_global_loss(two):
    assert two[0]["halves"]["losses"] == two[1]["halves"]["losses"]


def test_a_rank_without_an_image_does_not_hang(one, two):
    """Rank 1 has only text in its micro-batch. One rank with all four samples gives the same result."""
    assert_same(one["mixed"], two[0]["mixed"])


def test_packed_batches_equal_padded_ones(one, two):
    """Two ranks with packed samples, one of them without an image, against one rank with padding."""
    assert_same(one["mixed"], two[0]["packed"])


def test_a_batch_without_images_on_any_rank(two):
    result = two[0]["text"]
    assert result["losses"][0]["loss/similarity"] == 0 == result["losses"][0]["loss/attention"]
    assert "steering.weight" not in result["changed"]


def _moved(result: dict[str, Any], part: str) -> bool:
    return any(part in name for name in result["changed"])


def test_a_projector_with_learning_rate_zero_stays_bit_identical(one):
    result = one["still projector"]
    assert not _moved(result, "multi_modal_projector")
    assert _moved(result, "lora_") and _moved(result, "steering")
    assert _moved(one["whole"], "multi_modal_projector")


def test_w_never_decays(one):
    """The projector also has gradient zero, but it decays, which shows that weight decay was active."""
    result = one["decay"]
    assert not _moved(result, "steering") and _moved(result, "multi_modal_projector")


@pytest.mark.parametrize("run", ["falling", "bf16"])
def test_losses_fall(one, run):
    losses = one[run]["losses"]
    assert losses[-1]["loss/total"] < losses[0]["loss/total"]


def test_bf16_begins_with_the_losses_of_fp32(one):
    """bf16 keeps 8 bits, 2^-8 per rounding. A loss is a mean of many rounded values, so it differs by less than one."""
    bf16, fp32 = (one[run]["losses"][0] for run in ("bf16", "falling"))
    for name in ("loss/language", "loss/similarity", "loss/attention"):
        assert bf16[name] == pytest.approx(fp32[name], rel=2**-8), name
        assert bf16[name] != fp32[name], "nothing was rounded, so this was not a bf16 run"
    assert one["bf16"]["frozen"]["before"] == one["bf16"]["frozen"]["after"]
