"""Losses and gradients of the released code on fixed inputs, matched to 1e-4 relative (float32 noise is 1e-6)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medalign.kernels import attention_map, token_similarity
from medalign.losses import attention_kl
from medalign.student.query_mixture import QueryMixture
from medalign.student.steering import Steering

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden" / "official_losses.npz"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason=f"golden values not found at {GOLDEN}")
IMPLEMENTATIONS = ("reference", "chunked")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as stored:
        return {name: torch.from_numpy(np.asarray(stored[name])) for name in stored.files}


def relative(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("impl", (*IMPLEMENTATIONS, "triton"))
@pytest.mark.parametrize("name", ["spatial", "spatial_weighted"])
def test_spatial_loss(golden, name, impl):
    student = golden["spatial_student"][None].requires_grad_()
    weight = golden["spatial_weight"][None] if name == "spatial_weighted" else None
    loss = token_similarity(student, golden["spatial_teacher"][None], None, weight, impl=impl)
    loss.sum().backward()
    assert relative(loss[0].detach(), golden[f"{name}_loss"]) < 1e-4
    assert relative(student.grad[0], golden[f"{name}_grad"]) < 1e-4


def tapped(golden, impl):
    """Query, key and the map at the image columns; the rows of the question end before `attn_question_end`."""
    query, key = golden["attn_q"][None].requires_grad_(), golden["attn_k"][None].requires_grad_()
    start, end = int(golden["attn_img_start"]), int(golden["attn_img_start"] + golden["attn_img_len"])
    place = torch.arange(query.shape[2])[None]
    columns = (place >= start) & (place < end)
    rows = (place >= end) & (place < int(golden["attn_question_end"]))
    return query, key, attention_map(query, key, rows, columns, impl=impl)[:, start:end]


@pytest.mark.parametrize("impl", (*IMPLEMENTATIONS, "triton"))
def test_mean_map(golden, impl):
    assert relative(tapped(golden, impl)[2][0].detach(), golden["attn_mean_map"]) < 1e-4


@pytest.mark.parametrize("impl", (*IMPLEMENTATIONS, "triton"))
@pytest.mark.parametrize(
    ("normalize", "loss_name", "gradients"),
    [
        ("official", "attn_official_loss", "attn_official_grad"),
        ("sum", "attn_kl_sum", "attn_kl_sum_grad"),
        ("softmax", "attn_kl_softmax", "attn_kl_softmax_grad"),
    ],
)
def test_attention_loss(golden, normalize, loss_name, gradients, impl):
    query, key, student_map = tapped(golden, impl)
    loss = attention_kl(student_map, golden["attn_label"][None], normalize=normalize)
    loss.sum().backward()
    assert relative(loss[0].detach(), golden[loss_name]) < 1e-4
    assert relative(query.grad[0], golden[f"{gradients}_q"]) < 1e-4
    if f"{gradients}_k" in golden:
        assert relative(key.grad[0], golden[f"{gradients}_k"]) < 1e-4


def test_steering(golden):
    steering = Steering(golden["steer_W"].shape[0])
    steering.weight.data.copy_(golden["steer_W"])
    hidden = golden["steer_in"][None]
    place = torch.arange(hidden.shape[1])[None]
    start = int(golden["steer_start"])
    image = (place >= start) & (place < start + int(golden["attn_img_len"]))
    steered = steering(hidden, image)[0].detach()
    assert relative(steered, golden["steer_out"]) < 1e-4
    assert torch.equal(steered[~image[0]], golden["steer_in"][~image[0]])


def test_query_mixture(golden):
    """The released router reads the token at `moe_question_end` itself: there, the last token of the question."""
    down, up = golden["moe_A"], golden["moe_B"]
    experts, rank, width = down.shape
    mixture = QueryMixture(width, up.shape[1], experts, rank, float(golden["moe_alpha"]))
    mixture.down.data.copy_(down)
    mixture.up.data.copy_(up)
    mixture.router.weight.data.copy_(golden["moe_router_w"])
    mixture.router.bias.data.copy_(golden["moe_router_b"])
    hidden = golden["moe_x"][None]
    projection = torch.nn.Linear(width, golden["moe_base"].shape[0], bias=False)
    projection.weight.data.copy_(golden["moe_base"])
    mixture.attach(projection)
    mixture.begin(torch.arange(hidden.shape[1])[None] <= int(golden["moe_question_end"]))
    assert relative(projection(hidden)[0].detach(), golden["moe_y"]) < 1e-4
