"""The Triton kernels of token similarity against the specification in float64.

They run on Triton's interpreter, in float32 and float16: it multiplies bfloat16 as if it were integers. On a GPU,
compiled, `medalign bench kernels --device cuda` measures the same errors.
"""

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medalign.errors import KernelError
from medalign.kernels import dispatch, gpu, token_similarity
from medalign.kernels.token_similarity import tile_table, triton_launches
from medalign.kernels.token_similarity import triton as room
from tests.unit.kernels.allocations import LargestTensor

# Relative, in norm: cosines are good to some 1e-7, and D = cos - cos' of unrelated features is a tenth of them.
NEAR = 3e-6
TINY = 1e-9  # absolute, where the exact answer is 0: (1e-7 rounding)^2, with room


def inputs(samples, tokens, width=37, teacher_width=21, seed=0):
    """Float64 tensors whose values are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(samples, tokens, width, generator=generator)
    teacher = torch.randn(samples, tokens, teacher_width, generator=generator)
    return student.double(), teacher.double()


def solve(impl, student, teacher, mask=None, weight=None, dtype=torch.float32):
    """Loss and gradient for an upstream gradient that is neither 1 nor equal for all samples."""
    student = student.to(dtype).detach().requires_grad_()
    loss = token_similarity(student, teacher.to(dtype), mask, weight, impl=impl)
    upstream = torch.linspace(-1.5, 2, loss.shape[0], dtype=loss.dtype, device=loss.device)
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    return loss.detach(), gradient


def assert_near(found, expected, limit=NEAR):
    for name, one, other in zip(("loss", "gradient"), found, expected, strict=True):
        assert one.shape == other.shape and one.isfinite().all(), name
        error = (one.double() - other).norm()
        assert error <= limit * other.norm() + TINY, f"{name}: {error / other.norm():.1e}"


def masked_and_weighted(tokens):
    """Holes, a ragged sample, and one without any token."""
    generator = torch.Generator().manual_seed(tokens)
    mask = torch.rand(3, tokens, generator=generator) > 0.3
    mask[1] = False
    mask[2, tokens // 2 :] = False
    return mask, torch.rand(3, tokens, generator=generator) * 2


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 196])
def test_value_and_gradient(tokens, ragged):
    student, teacher = inputs(3, tokens)
    mask, weight = masked_and_weighted(tokens) if ragged else (None, None)
    wide = None if weight is None else weight.double()
    expected = solve("reference", student, teacher, mask, wide, torch.float64)
    assert_near(solve("triton", student, teacher, mask, weight), expected)


@pytest.mark.parametrize("tokens", [575, 576])
def test_tokens_of_real_images_on_the_tiles_of_half_precision(tokens, monkeypatch):
    tiles = tile_table.table()["sm_90"]
    monkeypatch.setattr(tile_table, "differences", lambda *_: tiles["differences"]["half"])
    monkeypatch.setattr(tile_table, "gradients", lambda *_: tiles["gradients"]["half"])
    student, teacher = inputs(1, tokens, width=67, teacher_width=130)
    assert_near(solve("triton", student, teacher), solve("reference", student, teacher, dtype=torch.float64))


@pytest.mark.parametrize("ragged", [False, True])
def test_several_panels_and_groups(ragged, monkeypatch):
    """300 tokens in three panels, one sample per group, as with thousands of tokens."""
    monkeypatch.setattr(triton_launches, "TALLEST_PANEL", 128)
    monkeypatch.setattr(room, "WORKSPACE_ELEMENTS", 1)
    student, teacher = inputs(3, 300, width=5, teacher_width=3)
    mask, weight = masked_and_weighted(300) if ragged else (None, None)
    wide = None if weight is None else weight.double()
    expected = solve("reference", student, teacher, mask, wide, torch.float64)
    assert_near(solve("triton", student, teacher, mask, weight), expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_float16_with_norms_far_from_one(scale):
    """In float16, D (in both terms of the gradient), the gradient, and its product with the upstream are each rounded.

    One rounding is at most 2^-11 of an element.
    """
    student, teacher = inputs(2, 70)
    student = (student * scale).half().double()
    found = solve("triton", student, teacher.half().double(), dtype=torch.float16)
    expected = solve("reference", student, teacher.half().double(), dtype=torch.float64)
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.float16
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-8)
    # Where |s| is large, the exact gradient lies below the smallest float16 number, 2^-24.
    limit = 4 * 2**-11 * expected[1].norm() + 2**-24 * student.numel() ** 0.5
    assert (found[1].double() - expected[1]).norm() < limit


def test_a_teacher_in_another_type():
    student, teacher = inputs(2, 20)
    teacher = teacher.half()
    loss = token_similarity(student.float(), teacher, impl="triton")
    torch.testing.assert_close(
        loss, token_similarity(student, teacher.double(), impl="reference").float(), rtol=NEAR, atol=TINY
    )


def test_features_that_are_not_contiguous():
    student, teacher = inputs(2, 20)
    apart = torch.randn(2, 40, 50)
    apart[:, ::2, 5:42] = student.float()
    swapped = teacher.float().transpose(1, 2).contiguous().transpose(1, 2)
    found = solve("triton", apart[:, ::2, 5:42], swapped)
    assert_near(found, solve("reference", student, teacher, dtype=torch.float64))


def test_values_of_masked_tokens_do_not_matter():
    student, teacher = inputs(2, 80)
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[:, 70:] = False
    mask[:, 3] = False
    expected = solve("reference", student, teacher, mask, dtype=torch.float64)
    student[:, 70:], student[:, 3], teacher[:, 3] = float("nan"), float("inf"), float("nan")
    loss, gradient = solve("triton", student, teacher, mask, torch.where(mask, 1.0, float("nan")))
    assert_near((loss, gradient), expected)
    assert (gradient[:, 70:] == 0).all() and (gradient[:, 3] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_a_token_that_is_not_finite_reaches_loss_and_gradient_with_a_warning(impl, value, caplog):
    """Training then leaves the step out, on all ranks."""
    student, teacher = inputs(2, 20)
    student[0, 3, 4] = value
    with np.errstate(invalid="ignore"):
        loss, gradient = solve(impl, student, teacher)
    assert not loss[0].isfinite() and loss[1].isfinite() and not gradient[0].isfinite().all()
    assert "token_similarity: NaN or infinity at valid tokens of student;" in caplog.text


def test_a_token_without_direction_gets_no_gradient():
    student, teacher = inputs(1, 20)
    student[0, 2] = 0
    found = solve("triton", student, teacher)
    assert_near(found, solve("reference", student, teacher, dtype=torch.float64))
    assert (found[1][0, 2] == 0).all()


def test_two_runs_are_bit_equal():
    student, teacher = inputs(2, 150)
    for one, other in zip(*(solve("triton", student, teacher) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_without_a_gradient_nothing_is_stored():
    student, teacher = (each.float() for each in inputs(2, 20))
    plain = token_similarity(student.requires_grad_(), teacher, impl="triton")
    with torch.no_grad():
        alone = token_similarity(student, teacher, impl="triton")
    assert alone.grad_fn is None and torch.equal(alone, plain)


@settings(max_examples=4, deadline=None)
@given(tokens=st.integers(2, 90), seed=st.integers(0, 2**16))
def test_invariances(tokens, seed):
    """To a rotation of the features, to the length of each token, and to the order of the tokens."""
    student, teacher = inputs(1, tokens, width=13, teacher_width=7, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(13, 13, generator=generator, dtype=torch.float64))[0]
    length = torch.rand(1, tokens, 1, generator=generator) * 9 + 0.1
    order = torch.randperm(tokens, generator=generator)
    loss, gradient = solve("triton", student, teacher)
    assert (gradient * student).sum(-1).abs().max() < 1e-6  # rotating a token changes the loss, scaling it does not
    assert_near(solve("triton", student @ rotation, teacher), (loss.double(), gradient.double() @ rotation))
    assert_near(solve("triton", student * length, teacher), (loss.double(), gradient.double() / length))
    moved = solve("triton", student[:, order], teacher[:, order])
    assert_near(moved, (loss.double(), gradient[:, order].double()))


def test_memory_is_linear_in_the_tokens(monkeypatch):
    monkeypatch.setattr(triton_launches, "TALLEST_PANEL", 128)
    elements = []
    for tokens in (256, 512):
        student, teacher = inputs(1, tokens, width=4, teacher_width=3)
        with LargestTensor() as largest:
            solve("triton", student, teacher)
        elements.append(largest.elements)
        # The interpreter copies tensors byte by byte, so this counts the bytes of a panel, not of an N x N matrix.
        assert largest.elements <= 4 * 128 * tokens
    assert elements[1] <= 2.2 * elements[0]


@pytest.mark.parametrize(("tokens", "count", "height"), [(1, 1, 128), (576, 1, 640), (2304, 2, 1152), (16384, 8, 2048)])
def test_panels(tokens, count, height):
    assert triton_launches.panels(tokens) == (count, height)


class TestRefusals:
    """A path that is requested by name and cannot run is an error with the remedy."""

    def solve(self, dtype=torch.float32):
        return token_similarity(torch.zeros(1, 4, 3, dtype=dtype), torch.zeros(1, 4, 2), impl="triton")

    def test_float64(self):
        with pytest.raises(KernelError, match='float64 is not float32, .*; convert the input, or choose impl="chu'):
            self.solve(torch.float64)

    def test_no_triton(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(KernelError, match="triton is not installed; pip install triton"):
            self.solve()

    def test_no_gpu(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(KernelError, match="the tensors are on cpu and the kernels need CUDA; move them"):
            self.solve()

    @pytest.mark.parametrize(
        ("lacking", "reason"),
        [
            ("compiler", r"no C compiler was found; install one \(apt install gcc\), or cho"),
            ("headers", r"Python's headers are not"),
        ],
    )
    def test_a_gpu_without_a_compiler_for_triton(self, monkeypatch, tmp_path, lacking, reason):
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(gpu.shutil, "which", lambda name: None if lacking == "compiler" else "/usr/bin/" + name)
        monkeypatch.setattr(gpu.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
        gpu.missing_to_build.cache_clear()
        try:
            assert re.search(reason, gpu.refusal(torch.device("cuda", 0), torch.bfloat16))
            (tmp_path / "Python.h").touch()
            gpu.missing_to_build.cache_clear()
            assert (gpu.refusal(torch.device("cuda", 0)) is None) == (lacking == "headers")
        finally:
            gpu.missing_to_build.cache_clear()

    def test_too_little_shared_memory(self, monkeypatch):
        monkeypatch.setattr(gpu, "shared_memory", lambda device: 1000)
        with pytest.raises(KernelError, match=r"needs \d+ bytes of shared memory and cpu has 1000; choose impl"):
            self.solve()


@pytest.mark.parametrize(("refusal", "name"), [(None, "triton"), ("the card is too old", "chunked")])
def test_auto_on_cuda(refusal, name):
    """Selects the kernel if it can run, otherwise the chunked path, and logs the reason."""
    seen = []

    def available(device, *dtypes):
        seen.append((device, dtypes))
        return refusal

    device = torch.device("cuda")
    chosen, reason = dispatch._automatic(device, (torch.bfloat16,), {"triton": available})
    assert chosen == name and (refusal or "fused") in reason
    assert seen == [(device, (torch.bfloat16,))]


def test_auto_on_the_cpu_is_not_interpreted():
    chosen, _ = dispatch._automatic(torch.device("cpu"), (torch.float32,), {"triton": room.available})
    assert chosen == "chunked"


def test_the_table_of_configurations_fits_the_kernels():
    stored = json.loads(tile_table.TABLE.read_text())
    assert stored.keys() == gpu.ARCHITECTURES.keys()
    for architecture, kernels in tile_table.table().items():
        for kernel, tiles in kernels.items():
            for kind, tile in tiles.items():
                assert stored[architecture][kernel][kind]["reason"]
                assert tile_table.GRAIN % tile.rows == 0 and tile_table.GRAIN % tile.depth == 0
                assert kernel != "differences" or tile.rows == tile.columns, "mirror images need square tiles"
        for dtype in gpu.DTYPES:
            needed = tile_table.shared_memory(architecture, dtype, dtype)
            assert needed <= gpu.ARCHITECTURES[architecture].shared_memory
