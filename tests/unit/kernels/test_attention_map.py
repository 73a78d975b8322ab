"""The attention map: the chunked path against the specification, and the specification against first principles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medalign.errors import KernelError
from medalign.kernels import attention_map
from medalign.kernels.attention_map import chunked
from tests.unit.kernels.allocations import LargestTensor

IMPLEMENTATIONS = ("reference", "chunked")
EXACT = {"rtol": 1e-9, "atol": 1e-14}


def inputs(length, heads=6, key_heads=2, width=5, dtype=torch.float64, seed=0):
    """Sample 0 is full, 1 padded on the right, 2 on the left, 3 has no rows (but columns)."""
    generator = torch.Generator().manual_seed(seed)
    samples = 4
    query = torch.randn(samples, heads, length, width, generator=generator, dtype=torch.float64)
    key = torch.randn(samples, key_heads, length, width, generator=generator, dtype=torch.float64)
    valid = torch.ones(samples, length, dtype=torch.bool)
    valid[1, length - length // 5 :] = False
    valid[2, : length // 5] = False
    place = torch.arange(length)
    columns = ((place >= length // 4) & (place < length // 2)).repeat(samples, 1)
    rows = ((place >= length // 2) & (place < length - length // 6)).repeat(samples, 1)
    rows[3] = False
    tensors = (query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_())
    return tensors, rows, columns, valid


def map_and_gradients(impl, tensors, rows, columns, valid, scale=None, **options):
    found = attention_map(*tensors, rows, columns, attention_mask=valid, scale=scale, impl=impl, **options)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return found.detach(), *torch.autograd.grad(found, tensors, upstream.to(found.dtype))


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("length", [1, 2, 17, 60])
@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.7}, {"softcap": 0.9}, {"window": 9}, {"softcap": 0.9, "window": 9}]
)
def test_chunked_is_the_reference(length, heads, options):
    tensors, rows, columns, valid = inputs(length, *heads)
    if length == 1:
        rows[:3] = True
        columns[:] = True
    expected = map_and_gradients("reference", tensors, rows, columns, valid, **options)
    found = map_and_gradients("chunked", tensors, rows, columns, valid, **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
        assert one.isfinite().all()


@pytest.mark.parametrize("elements", [1, 500])
def test_chunks_of_few_rows_add_up(monkeypatch, elements):
    tensors, rows, columns, valid = inputs(40)
    whole = map_and_gradients("chunked", tensors, rows, columns, valid)
    monkeypatch.setattr(chunked, "SCORE_ELEMENTS", elements)
    for one, other in zip(map_and_gradients("chunked", tensors, rows, columns, valid), whole, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"softcap": 0.9, "window": 4}])
def test_gradcheck(impl, options):
    (query, key), rows, columns, valid = inputs(9, heads=2, key_heads=1, width=2)

    def tapped(query, key):
        return attention_map(query, key, rows, columns, attention_mask=valid, impl=impl, **options)

    assert torch.autograd.gradcheck(tapped, (query, key))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (0.7, None), (None, 7)])
def test_against_plain_attention_of_the_unpadded_sample(impl, softcap, window):
    """Padding on either side changes nothing, and query heads read the key head of their group."""
    (query, key), rows, columns, valid = inputs(30)
    found = attention_map(query, key, rows, columns, attention_mask=valid, softcap=softcap, window=window, impl=impl)
    for sample in range(3):
        keep = valid[sample]
        length = int(keep.sum())
        shared = key[sample][:, keep].repeat_interleave(3, dim=0)
        scores = query[sample][:, keep] @ shared.transpose(1, 2) / 5**0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if window is not None:
            hidden |= torch.ones(length, length, dtype=torch.bool).tril(-window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        expected = weights[:, rows[sample][keep]].mean((0, 1)) * columns[sample][keep]
        torch.testing.assert_close(found[sample][keep], expected, **EXACT)
        assert (found[sample][~keep] == 0).all()


def packed(tensors, rows, columns, valid):
    """The valid tokens of every sample end to end, one empty sequence among them, and where each begins."""
    lengths = valid.sum(1)
    ends = torch.cat([torch.zeros(1), lengths.cumsum(0)[[0, 1, 1, 2, 3]]]).to(torch.int32)
    ragged = tuple(tensor.detach().transpose(1, 2)[valid].transpose(0, 1)[None].requires_grad_() for tensor in tensors)
    return ragged, rows[valid][None], columns[valid][None], ends


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"softcap": 0.9, "window": 9}])
def test_a_packed_batch_is_the_padded_one(impl, options):
    tensors, rows, columns, valid = inputs(40)
    ragged, ragged_rows, ragged_columns, ends = packed(tensors, rows, columns, valid)
    upstream = torch.randn(valid.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = attention_map(*tensors, rows, columns, attention_mask=valid, impl="reference", **options)
    found = attention_map(*ragged, ragged_rows, ragged_columns, cu_seqlens=ends, impl=impl, **options)
    torch.testing.assert_close(found[0], expected[valid], **EXACT)
    wanted = torch.autograd.grad(expected, tensors, upstream)
    for one, other in zip(torch.autograd.grad(found, ragged, upstream[valid][None]), wanted, strict=True):
        torch.testing.assert_close(one[0].transpose(0, 1), other.transpose(1, 2)[valid], **EXACT)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("empty", ["rows", "columns", "everything is padding"])
def test_no_rows_or_columns_give_zero_and_no_gradient(impl, empty):
    tensors, rows, columns, valid = inputs(20)
    for mask in {"rows": [rows], "columns": [columns]}.get(empty, [valid]):
        mask[:] = False
    for result in map_and_gradients(impl, tensors, rows, columns, valid):
        assert (result == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_values_at_padding_do_not_matter(impl):
    tensors, rows, columns, valid = inputs(20)
    expected = map_and_gradients(impl, tensors, rows, columns, valid)
    spoiled = tuple(
        tensor.detach().masked_fill(~valid[:, None, :, None], float("nan")).requires_grad_() for tensor in tensors
    )
    for one, other in zip(map_and_gradients(impl, spoiled, rows, columns, valid), expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_gradient_reaches_keys_outside_the_columns(impl):
    tensors, rows, columns, valid = inputs(20)
    _, _, key_gradient = map_and_gradients(impl, tensors, rows, columns, valid)
    assert (key_gradient[0][:, :5].abs().sum(-1) > 0).all()  # columns begin at 5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_half_precision_inputs_are_computed_in_float32(impl):
    tensors, rows, columns, valid = inputs(40, dtype=torch.bfloat16)
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    found = map_and_gradients(impl, tensors, rows, columns, valid)
    expected = map_and_gradients("reference", wide, rows, columns, valid)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == torch.bfloat16
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-8)
    for one, other in zip(found[1:], expected[1:], strict=True):
        # Rounded once to 8 bits, at most 2^-9 of each element; the float32 sums before add 1e-5.
        assert (one.double() - other).norm() / other.norm() < 2**-9 + 1e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradient_of_one_input_only(impl):
    (query, key), rows, columns, valid = inputs(12)
    both = map_and_gradients(impl, (query, key), rows, columns, valid)[1:]
    upstream = torch.randn(4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = ((query, key.detach()), (query.detach(), key))
    for wanted, pair, expected in zip((query, key), pairs, both, strict=True):
        found = attention_map(*pair, rows, columns, attention_mask=valid, impl=impl)
        torch.testing.assert_close(torch.autograd.grad(found, wanted, upstream)[0], expected, **EXACT)


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 25),
    grouped=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    seed=st.integers(0, 2**16),
    impl=st.sampled_from(IMPLEMENTATIONS),
)
def test_the_map_is_a_fraction_of_the_attention(length, grouped, seed, impl):
    """Never negative, at most 1 in sum, exactly 1 over all columns; a common rotation of Q and K changes nothing."""
    (query, key), *_ = inputs(length, *grouped, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns, valid = (torch.rand(4, length, generator=generator) < p for p in (0.4, 0.5, 0.8))
    found = attention_map(query, key, rows, columns, attention_mask=valid, impl=impl)
    assert (found >= 0).all() and (found.sum(1) <= 1 + 1e-9).all() and (found[~(columns & valid)] == 0).all()
    whole = attention_map(query, key, rows, torch.ones_like(rows), attention_mask=valid, impl=impl).sum(1)
    torch.testing.assert_close(whole, (rows & valid).any(1).to(whole), **EXACT)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    turned = attention_map(query @ rotation, key @ rotation, rows, columns, attention_mask=valid, impl=impl)
    torch.testing.assert_close(turned, found, rtol=1e-9, atol=1e-12)


def test_chunked_keeps_only_the_scores_of_the_rows(monkeypatch):
    length = 512
    tensors, rows, columns, valid = inputs(length, heads=2, key_heads=1, width=2, dtype=torch.float32)
    rows[:] = True
    monkeypatch.setattr(chunked, "SCORE_ELEMENTS", 2**14)
    with LargestTensor() as seen:
        attention_map(*tensors, rows, columns, attention_mask=valid, impl="chunked").sum().backward()
    assert seen.elements <= 2**14 < length**2


def test_unknown_implementation():
    tensors, rows, columns, _ = inputs(6)
    with pytest.raises(KernelError, match="auto, reference, chunked"):
        attention_map(*tensors, rows, columns, impl="flash")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"query": torch.zeros(4, 6, 5)}, "query"),
        ({"key": torch.zeros(2, 4, 6, 5)}, "multiple of the key heads"),
        ({"key": torch.zeros(2, 3, 7, 5)}, r"key \(2, 3, 7, 5\)"),
        ({"key": torch.zeros(2, 3, 6, 4)}, "key"),
        ({"key": torch.zeros(2, 0, 6, 5)}, "key"),
        ({"key": torch.zeros(2, 3, 6, 5, device="meta")}, "key is on meta"),
        ({"rows": torch.ones(2, 6)}, "rows must be bool"),
        ({"rows": None}, "rows"),
        ({"columns": torch.ones(2, 5, dtype=torch.bool)}, "columns"),
        ({"attention_mask": torch.ones(2, 6, dtype=torch.int64)}, "attention_mask must be bool"),
        ({"softcap": 0.0}, "softcap must be a positive number, got 0.0"),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"window": 2.5}, "window"),
        ({"cu_seqlens": [0, 6]}, "cu_seqlens must be an int32 or int64 tensor"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens must be"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "one sample of packed sequences"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    mask = torch.ones(2, 6, dtype=torch.bool)
    good = {"query": torch.zeros(2, 6, 6, 5), "key": torch.zeros(2, 3, 6, 5), "rows": mask, "columns": mask}
    with pytest.raises(ValueError, match=named):
        attention_map(**(good | arguments))


@pytest.mark.parametrize("ends", [[0, 5], [1, 6], [0, 4, 2, 6]])
def test_sequences_that_do_not_fill_the_batch_are_refused(ends):
    mask = torch.ones(1, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"cu_seqlens must increase from 0 to the query's 6 tokens, got \["):
        attention_map(torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 6, 4), mask, mask, cu_seqlens=torch.tensor(ends))
