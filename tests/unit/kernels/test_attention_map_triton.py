"""The Triton kernels of the attention map, in float32 on Triton's interpreter, against the specification in float64."""

import pytest
import torch

from medalign.errors import KernelError
from medalign.kernels import attention_map
from medalign.kernels.attention_map import tile_table, triton_kernels
from tests.unit.kernels.allocations import LargestTensor
from tests.unit.kernels.test_attention_map import inputs, map_and_gradients, packed

NEAR = 2e-6  # relative error in norm: sums of some hundred float32 terms, each good to 6e-8
OPTIONS = ({}, {"scale": 0.7}, {"softcap": 0.9}, {"window": 37}, {"softcap": 0.9, "window": 37})


def single(tensors):
    return tuple(tensor.detach().float().requires_grad_() for tensor in tensors)


def assert_near(found, expected, limit=NEAR):
    for name, one, other in zip(("map", "query gradient", "key gradient"), found, expected, strict=True):
        assert one.isfinite().all(), name
        error = (one.double() - other).norm() / other.norm().clamp_min(1e-30)
        assert error < limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("length", "heads", "key_heads", "width"), [(1, 2, 1, 64), (17, 6, 2, 80), (60, 3, 3, 5), (97, 2, 1, 33)]
)
def test_value_and_gradients(length, heads, key_heads, width, options):
    tensors, rows, columns, valid = inputs(length, heads, key_heads, width)
    if length == 1:
        rows[:3] = True
        columns[:] = True
    expected = map_and_gradients("reference", tensors, rows, columns, valid, **options)
    assert_near(map_and_gradients("triton", single(tensors), rows, columns, valid, **options), expected)


@pytest.mark.parametrize(("length", "width"), [(196, 96), (575, 64), (576, 192)])
def test_lengths_of_real_images(monkeypatch, length, width):
    """With the tiles of half precision, which load whole vectors."""
    tiles = tile_table.tiles("sm_90", torch.bfloat16, width)
    monkeypatch.setattr(tile_table, "tiles", lambda *_: tiles)
    tensors, rows, columns, valid = inputs(length, 2, 1, width)
    rows[:, length * 2 // 3 :] = False
    expected = map_and_gradients("reference", tensors, rows, columns, valid)
    assert_near(map_and_gradients("triton", single(tensors), rows, columns, valid), expected)


@pytest.mark.parametrize("options", [{}, {"softcap": 0.9, "window": 9}])
def test_a_packed_batch_is_the_padded_one(options):
    tensors, rows, columns, valid = inputs(50, 4, 2, 20)
    ragged, ragged_rows, ragged_columns, ends = packed(tensors, rows, columns, valid)
    upstream = torch.randn(valid.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = attention_map(*tensors, rows, columns, attention_mask=valid, impl="reference", **options)
    gradients = torch.autograd.grad(expected, tensors, upstream)
    ragged = single(ragged)
    found = attention_map(*ragged, ragged_rows, ragged_columns, cu_seqlens=ends, impl="triton", **options)
    results = found, *torch.autograd.grad(found, ragged, upstream[valid][None].float())
    wanted = [expected[valid], *(gradient.transpose(1, 2)[valid] for gradient in gradients)]
    assert_near([results[0][0], *(result[0].transpose(0, 1) for result in results[1:])], wanted)


@pytest.mark.parametrize("empty", ["rows", "columns", "everything is padding"])
def test_no_rows_or_columns_give_zero_and_no_gradient(empty):
    tensors, rows, columns, valid = inputs(20)
    for mask in {"rows": [rows], "columns": [columns]}.get(empty, [valid]):
        mask[:] = False
    for result in map_and_gradients("triton", single(tensors), rows, columns, valid):
        assert (result == 0).all()


def test_values_at_padding_do_not_matter():
    tensors, rows, columns, valid = inputs(40)
    tensors = single(tensors)
    expected = map_and_gradients("triton", tensors, rows, columns, valid)
    spoiled = tuple(
        tensor.detach().masked_fill(~valid[:, None, :, None], float("nan")).requires_grad_() for tensor in tensors
    )
    for one, other in zip(map_and_gradients("triton", spoiled, rows, columns, valid), expected, strict=True):
        assert torch.equal(one, other)


def test_a_nan_at_a_valid_token_reaches_the_result_with_a_warning(caplog):
    tensors, rows, columns, valid = inputs(40)
    tensors = single(tensors)
    tensors[1].data[0, 1, 3, 2] = float("nan")
    found, *_ = map_and_gradients("triton", tensors, rows, columns, valid)
    assert found.isnan().any() and "attention_map: NaN or infinity at valid tokens of key;" in caplog.text


def test_the_gradient_reaches_keys_outside_the_columns():
    tensors, rows, columns, valid = inputs(20)
    _, _, key_gradient = map_and_gradients("triton", single(tensors), rows, columns, valid)
    assert (key_gradient[0][:, :5].abs().sum(-1) > 0).all()  # columns begin at 5


def test_strides_of_heads_and_tokens_may_have_any_order():
    """Models pass views of [B, L, H, d] and slices of a wider projection; masks may also be transposed."""
    tensors, rows, columns, valid = inputs(24, 2, 1, 16)
    tensors = single(tensors)
    expected = map_and_gradients("triton", tensors, rows, columns, valid)
    layouts = (
        lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
        lambda tensor: torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]],
        lambda tensor: tensor.transpose(2, 3).contiguous().transpose(2, 3),
    )
    for layout in layouts:
        views = tuple(layout(tensor.detach()).requires_grad_() for tensor in tensors)
        masks = (mask.T.contiguous().T for mask in (rows, columns, valid))
        for one, other in zip(map_and_gradients("triton", views, *masks), expected, strict=True):
            assert torch.equal(one, other)


def test_gradient_of_one_input_only():
    (query, key), rows, columns, valid = inputs(24, 2, 1)
    query, key = single((query, key))
    both = map_and_gradients("triton", (query, key), rows, columns, valid)[1:]
    upstream = torch.randn(4, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    pairs = ((query, key.detach()), (query.detach(), key))
    for wanted, pair, expected in zip((query, key), pairs, both, strict=True):
        found = attention_map(*pair, rows, columns, attention_mask=valid, impl="triton")
        assert torch.equal(torch.autograd.grad(found, wanted, upstream)[0], expected)


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_half_precision(size):
    """Score gradients of size 1e-6 must not be rounded to float16's steps of 6e-8 there; large keys make them count."""
    tensors, rows, columns, valid = inputs(60, 4, 2, 16)
    half = tuple(
        (tensor.detach() * factor).half().requires_grad_() for tensor, factor in zip(tensors, (1e-3, 1e3), strict=True)
    )
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in half)
    upstream = size * torch.randn(rows.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = attention_map(*exact, rows, columns, attention_mask=valid, impl="reference")
    found = attention_map(*half, rows, columns, attention_mask=valid, impl="triton")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    wanted = torch.autograd.grad(expected, exact, upstream)
    for one, other in zip(torch.autograd.grad(found, half, upstream.float()), wanted, strict=True):
        # Score gradients and results are each rounded by at most 2^-11; results below 2^-14 by at most 2^-25.
        rounding = 2 * 2**-11
        torch.testing.assert_close(
            one.double(), other, rtol=rounding, atol=rounding * float(other.abs().max()) + 2**-25
        )


def test_two_runs_are_bit_equal():
    tensors, rows, columns, valid = inputs(70, 4, 2, 33)
    tensors = single(tensors)
    first, second = (map_and_gradients("triton", tensors, rows, columns, valid, softcap=0.9) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_the_map_is_a_fraction_of_the_attention(seed):
    """Never negative, at most 1 in sum, 1 over all columns; a common rotation of Q and K changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    (query, key), *_ = inputs(9 * seed + 3, 4, 2, 5, torch.float32, seed)
    rows, columns, valid = (torch.rand(4, query.shape[2], generator=generator) < p for p in (0.4, 0.5, 0.8))
    found = attention_map(query, key, rows, columns, attention_mask=valid, impl="triton")
    assert (found >= 0).all() and (found.sum(1) <= 1 + 1e-6).all() and (found[~(columns & valid)] == 0).all()
    whole = attention_map(query, key, rows, torch.ones_like(rows), attention_mask=valid, impl="triton").sum(1)
    torch.testing.assert_close(whole, (rows & valid).any(1).float(), rtol=0, atol=1e-6)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    turned = attention_map(query @ rotation, key @ rotation, rows, columns, attention_mask=valid, impl="triton")
    torch.testing.assert_close(turned, found, rtol=1e-4, atol=1e-6)  # the rotation itself is rounded


def test_memory_is_linear_in_the_tokens():
    """No storage beyond the inputs' 64 kB; one sample's [L, L] would be of 1 MB, and its rows' scores of 90 kB."""
    tensors, rows, columns, valid = inputs(512, heads=2, key_heads=1, width=16, dtype=torch.float32)
    query, key = (tensor.detach()[:1].clone().requires_grad_() for tensor in tensors)
    rows[:, :490], rows[:, 490:] = False, True
    with LargestTensor() as seen:
        attention_map(query, key, rows[:1], columns[:1], attention_mask=valid[:1], impl="triton").sum().backward()
    assert seen.elements <= query.nbytes == 2**16  # the interpreter views storages as bytes


def test_unsupported_inputs_are_refused():
    tensors, rows, columns, _ = inputs(6, width=257, dtype=torch.float32)
    with pytest.raises(KernelError, match=r'at most 256 channels, got query \(4, 6, 6, 257\).*choose impl="chunked"'):
        attention_map(*tensors, rows, columns, impl="triton")
    tensors, rows, columns, _ = inputs(6)
    with pytest.raises(KernelError, match=r"attention_map: impl=.triton. cannot run: torch.float64"):
        attention_map(*tensors, rows, columns, impl="triton")


def test_a_gpu_with_too_little_shared_memory_is_refused(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            def launch(**arguments):
                raise triton_kernels.OutOfResources(131872, 101376, "shared memory")

            return launch

    monkeypatch.setattr(triton_kernels, "log_sum_kernel", Kernel())
    tensors, rows, columns, _ = inputs(6, width=200, dtype=torch.float32)
    with pytest.raises(KernelError, match=r"200 channels per head .*Required: 131872.*101376.*choose impl=.chunked"):
        attention_map(*tensors, rows, columns, impl="triton")
