"""The four device kernels of the attention map; `triton.py` in this folder launches them and explains the design.

The grid is tiles x key heads. A tile is F pairs of (row, query head of the key head's group), or N keys, of one
segment, which `tile_segment` and `tile_first` determine. Rows come from a list, so only question rows are read. Tokens
are numbered across the whole batch, and all tokens of a segment belong to one sample. Scores are in base 2.

Suffixes: F pairs of a tile, N keys of a tile, D channels (padded to a power of two; WIDTH of them are real).
"""

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

__all__ = ["OutOfResources", "column_kernel", "key_gradient_kernel", "log_sum_kernel", "query_gradient_kernel"]

LOG2_E = tl.constexpr(1.4426950408889634)
RUN_SIZES = ("length", "tokens", "segments", "window")  # change from batch to batch: one binary serves all values


@triton.jit
def _sample(tensor, segment_first, segment, length, by_sample, by_token):
    """Address to which t * by_token is added for token t of the segment; in 64 bits, like every offset."""
    sample = (tl.load(segment_first + segment) // length).to(tl.int64)
    return tensor + sample * (by_sample - length.to(tl.int64) * by_token)


@triton.jit
def _pairs(row_token, row_first, segment, tile, head, tokens, GROUP: tl.constexpr, BLOCK_F: tl.constexpr):
    """For each pair of a tile: token (-1 if none), query head, and position in a [heads, tokens] buffer."""
    pair_F = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    row_F = tl.load(row_first + segment) + pair_F // GROUP
    token_F = tl.load(row_token + row_F, mask=row_F < tl.load(row_first + segment + 1), other=-1)
    head_F = (head * GROUP + pair_F % GROUP).to(tl.int64)
    return token_F, head_F, head_F * tokens + row_F


@triton.jit
def _vectors(tensor, offset_X, there_X, width, BLOCK_D: tl.constexpr):
    """Load vectors [X, D]; zero if there is no token, and beyond the width."""
    channel_D = tl.arange(0, BLOCK_D)
    mask_XD = there_X[:, None] & (channel_D < width)[None, :]
    return tl.load(tensor + offset_X[:, None] + channel_D[None, :], mask=mask_XD, other=0.0)


@triton.jit
def _store_vectors(tensor, offset_X, there_X, value_XD, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    channel_D = tl.arange(0, BLOCK_D)
    mask_XD = there_X[:, None] & (channel_D < WIDTH)[None, :]
    tl.store(tensor + offset_X[:, None] + channel_D[None, :], value_XD.to(tensor.dtype.element_ty), mask=mask_XD)


@triton.jit
def _products(
    left, left_offset_X, left_there_X, left_XD, right, right_offset_Y, right_there_Y, right_YD,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of vectors [X, Y], CHUNK channels at a time: whole float32 vectors do not fit in the registers."""
    if CHUNK == BLOCK_D:
        sum_XY = tl.dot(left_XD, tl.trans(right_YD), input_precision=PRECISION)
    else:
        sum_XY = tl.zeros([left_XD.shape[0], right_YD.shape[0]], tl.float32)
        for first in range(0, WIDTH, CHUNK):
            left_XC = _vectors(left + first, left_offset_X, left_there_X, WIDTH - first, CHUNK)
            right_YC = _vectors(right + first, right_offset_Y, right_there_Y, WIDTH - first, CHUNK)
            sum_XY = tl.dot(left_XC, tl.trans(right_YC), sum_XY, input_precision=PRECISION)
    return sum_XY


@triton.jit
def _capped(products, scale, softcap, CAPPED: tl.constexpr):
    """The scores in base 2, and the slope of the cap; `tanh x = 2 sigmoid(2 x) - 1`."""
    if CAPPED:
        tanh = 2 * tl.sigmoid(products * (2 * scale / softcap)) - 1
        score = tanh * (softcap * LOG2_E)
        slope = 1 - tanh * tanh
    else:
        score = products * (scale * LOG2_E)
        slope = 1.0
    return score, slope


@triton.jit
def _sees(row, key, valid, window):
    return (key <= row) & (row - key < window) & valid


@triton.jit
def _weights(products, log_sum, row, key, valid, window, scale, softcap, CAPPED: tl.constexpr):
    """The probabilities P, and the slope of the cap."""
    score, slope = _capped(products, scale, softcap, CAPPED)
    return tl.where(_sees(row, key, valid, window), tl.exp2(score - log_sum), 0.0), slope


@triton.jit(do_not_specialize=RUN_SIZES)
def log_sum_kernel(
    query, key, valid, row_token, row_first, segment_first, tile_segment, tile_first, log_sum,
    query_by_sample, query_by_head, query_by_token, key_by_sample, key_by_head, key_by_token,
    length, tokens, segments, window, scale, softcap,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For a tile of pairs: the base-2 logarithm of the sum of the exponentials of all visible scores."""
    head = tl.program_id(1)
    segment = tl.load(tile_segment + tl.program_id(0))
    if segment >= segments:
        return
    tile = tl.program_id(0) - tl.load(tile_first + segment)
    query = _sample(query, segment_first, segment, length, query_by_sample, query_by_token)
    key = _sample(key, segment_first, segment, length, key_by_sample, key_by_token) + head.to(tl.int64) * key_by_head
    token_F, head_F, place_F = _pairs(row_token, row_first, segment, tile, head, tokens, GROUP, BLOCK_F)
    offset_F = head_F * query_by_head + token_F.to(tl.int64) * query_by_token
    query_FD = _vectors(query, offset_F, token_F >= 0, WIDTH, BLOCK_D)
    first = tl.maximum(tl.min(tl.where(token_F < 0, tokens, token_F)) - window + 1, tl.load(segment_first + segment))
    stop = tl.max(token_F) + 1
    largest_F = tl.full([BLOCK_F], -1.0e30, tl.float32)  # finite, so that a pair without a visible key gives no NaN
    sum_F = tl.zeros([BLOCK_F], tl.float32)
    for start in range(first, stop, BLOCK_N):
        token_N = start + tl.arange(0, BLOCK_N)
        valid_N = tl.load(valid + token_N, mask=token_N < stop, other=0) != 0
        offset_N = token_N.to(tl.int64) * key_by_token
        key_ND = _vectors(key, offset_N, valid_N, WIDTH, BLOCK_D)
        products_FN = _products(
            query, offset_F, token_F >= 0, query_FD, key, offset_N, valid_N, key_ND, WIDTH, BLOCK_D, CHUNK, PRECISION
        )
        score_FN, _ = _capped(products_FN, scale, softcap, CAPPED)
        seen_FN = _sees(token_F[:, None], token_N[None, :], valid_N[None, :], window)
        score_FN = tl.where(seen_FN, score_FN, float("-inf"))
        larger_F = tl.maximum(largest_F, tl.max(score_FN, 1))
        sum_F = sum_F * tl.exp2(largest_F - larger_F) + tl.sum(tl.exp2(score_FN - larger_F[:, None]), 1)
        largest_F = larger_F
    tl.store(log_sum + place_F, largest_F + tl.log2(tl.where(token_F >= 0, sum_F, 1.0)), mask=token_F >= 0)


@triton.jit(do_not_specialize=RUN_SIZES)
def column_kernel(
    query, key, valid, row_token, row_first, segment_first, tile_segment, tile_first, log_sum, columns, share, partial,
    query_by_sample, query_by_head, query_by_token, key_by_sample, key_by_head, key_by_token,
    length, tokens, segments, window, scale, softcap,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For a tile of keys: the part of the map from the query heads of one key head, `partial` [K, tokens]."""
    head = tl.program_id(1)
    segment = tl.load(tile_segment + tl.program_id(0))
    if segment >= segments:
        return
    tile = tl.program_id(0) - tl.load(tile_first + segment)
    token_N = tl.load(segment_first + segment) + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_N = tl.load(columns + token_N, mask=token_N < tl.load(segment_first + segment + 1), other=0) != 0
    if tl.max(column_N.to(tl.int32)) == 0:
        return
    query = _sample(query, segment_first, segment, length, query_by_sample, query_by_token)
    key = _sample(key, segment_first, segment, length, key_by_sample, key_by_token) + head.to(tl.int64) * key_by_head
    offset_N = token_N.to(tl.int64) * key_by_token
    key_ND = _vectors(key, offset_N, column_N, WIDTH, BLOCK_D)
    pairs = (tl.load(row_first + segment + 1) - tl.load(row_first + segment)) * GROUP
    sum_N = tl.zeros([BLOCK_N], tl.float32)
    for number in range(tl.cdiv(pairs, BLOCK_F)):
        token_F, head_F, place_F = _pairs(row_token, row_first, segment, number, head, tokens, GROUP, BLOCK_F)
        offset_F = head_F * query_by_head + token_F.to(tl.int64) * query_by_token
        query_FD = _vectors(query, offset_F, token_F >= 0, WIDTH, BLOCK_D)
        log_sum_F = tl.load(log_sum + place_F, mask=token_F >= 0, other=float("inf"))
        products_NF = _products(
            key, offset_N, column_N, key_ND, query, offset_F, token_F >= 0, query_FD, WIDTH, BLOCK_D, CHUNK, PRECISION
        )
        weight_NF, _ = _weights(
            products_NF, log_sum_F[None, :], token_F[None, :], token_N[:, None], column_N[:, None],
            window, scale, softcap, CAPPED,
        )  # fmt: skip
        sum_N += tl.sum(weight_NF, 1)
    tl.store(partial + head.to(tl.int64) * tokens + token_N, sum_N * tl.load(share + segment), mask=column_N)


@triton.jit(do_not_specialize=RUN_SIZES)
def query_gradient_kernel(
    query, key, valid, row_token, row_first, segment_first, tile_segment, tile_first, log_sum, upstream, factor,
    inner, gradient,
    query_by_sample, query_by_head, query_by_token, key_by_sample, key_by_head, key_by_token,
    gradient_by_sample, gradient_by_head, gradient_by_token,
    length, tokens, segments, window, scale, softcap,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, WANTED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For a tile of pairs: `inner = sum_k P_k g_k`, then (if WANTED) `dQ = factor * P (g - inner) K`."""
    head = tl.program_id(1)
    segment = tl.load(tile_segment + tl.program_id(0))
    if segment >= segments:
        return
    tile = tl.program_id(0) - tl.load(tile_first + segment)
    query = _sample(query, segment_first, segment, length, query_by_sample, query_by_token)
    key = _sample(key, segment_first, segment, length, key_by_sample, key_by_token) + head.to(tl.int64) * key_by_head
    token_F, head_F, place_F = _pairs(row_token, row_first, segment, tile, head, tokens, GROUP, BLOCK_F)
    offset_F = head_F * query_by_head + token_F.to(tl.int64) * query_by_token
    query_FD = _vectors(query, offset_F, token_F >= 0, WIDTH, BLOCK_D)
    log_sum_F = tl.load(log_sum + place_F, mask=token_F >= 0, other=float("inf"))
    first = tl.maximum(tl.min(tl.where(token_F < 0, tokens, token_F)) - window + 1, tl.load(segment_first + segment))
    stop = tl.max(token_F) + 1
    inner_F = tl.zeros([BLOCK_F], tl.float32)
    for start in range(first, stop, BLOCK_N):
        token_N = start + tl.arange(0, BLOCK_N)
        valid_N = tl.load(valid + token_N, mask=token_N < stop, other=0) != 0
        upstream_N = tl.load(upstream + token_N, mask=token_N < stop, other=0.0)
        offset_N = token_N.to(tl.int64) * key_by_token
        key_ND = _vectors(key, offset_N, valid_N, WIDTH, BLOCK_D)
        products_FN = _products(
            query, offset_F, token_F >= 0, query_FD, key, offset_N, valid_N, key_ND, WIDTH, BLOCK_D, CHUNK, PRECISION
        )
        weight_FN, _ = _weights(
            products_FN, log_sum_F[:, None], token_F[:, None], token_N[None, :], valid_N[None, :],
            window, scale, softcap, CAPPED,
        )  # fmt: skip
        inner_F += tl.sum(weight_FN * upstream_N[None, :], 1)
    tl.store(inner + place_F, inner_F, mask=token_F >= 0)
    if WANTED:
        sum_FD = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
        for start in range(first, stop, BLOCK_N):
            token_N = start + tl.arange(0, BLOCK_N)
            valid_N = tl.load(valid + token_N, mask=token_N < stop, other=0) != 0
            upstream_N = tl.load(upstream + token_N, mask=token_N < stop, other=0.0)
            offset_N = token_N.to(tl.int64) * key_by_token
            key_ND = _vectors(key, offset_N, valid_N, WIDTH, BLOCK_D)
            products_FN = _products(
                query, offset_F, token_F >= 0, query_FD, key, offset_N, valid_N, key_ND,
                WIDTH, BLOCK_D, CHUNK, PRECISION,
            )  # fmt: skip
            weight_FN, slope_FN = _weights(
                products_FN, log_sum_F[:, None], token_F[:, None], token_N[None, :], valid_N[None, :],
                window, scale, softcap, CAPPED,
            )  # fmt: skip
            change_FN = weight_FN * (upstream_N[None, :] - inner_F[:, None]) * slope_FN
            sum_FD = tl.dot(change_FN.to(key_ND.dtype), key_ND, sum_FD, input_precision=PRECISION)
        gradient = _sample(gradient, segment_first, segment, length, gradient_by_sample, gradient_by_token)
        gradient_F = head_F * gradient_by_head + token_F.to(tl.int64) * gradient_by_token
        _store_vectors(gradient, gradient_F, token_F >= 0, sum_FD * tl.load(factor + segment), WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=RUN_SIZES)
def key_gradient_kernel(
    query, key, valid, row_token, row_first, segment_first, tile_segment, tile_first, log_sum, upstream, factor,
    inner, gradient,
    query_by_sample, query_by_head, query_by_token, key_by_sample, key_by_head, key_by_token,
    gradient_by_sample, gradient_by_head, gradient_by_token,
    length, tokens, segments, window, scale, softcap,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For a tile of keys: `dK = factor * (P (g - inner))^T Q` over all pairs of the key head's group."""
    head = tl.program_id(1)
    segment = tl.load(tile_segment + tl.program_id(0))
    if segment >= segments:
        return
    tile = tl.program_id(0) - tl.load(tile_first + segment)
    query = _sample(query, segment_first, segment, length, query_by_sample, query_by_token)
    key = _sample(key, segment_first, segment, length, key_by_sample, key_by_token) + head.to(tl.int64) * key_by_head
    token_N = tl.load(segment_first + segment) + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there_N = token_N < tl.load(segment_first + segment + 1)
    valid_N = tl.load(valid + token_N, mask=there_N, other=0) != 0
    upstream_N = tl.load(upstream + token_N, mask=there_N, other=0.0)
    offset_N = token_N.to(tl.int64) * key_by_token
    key_ND = _vectors(key, offset_N, valid_N, WIDTH, BLOCK_D)
    pairs = (tl.load(row_first + segment + 1) - tl.load(row_first + segment)) * GROUP
    sum_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for number in range(tl.cdiv(pairs, BLOCK_F)):
        token_F, head_F, place_F = _pairs(row_token, row_first, segment, number, head, tokens, GROUP, BLOCK_F)
        offset_F = head_F * query_by_head + token_F.to(tl.int64) * query_by_token
        query_FD = _vectors(query, offset_F, token_F >= 0, WIDTH, BLOCK_D)
        log_sum_F = tl.load(log_sum + place_F, mask=token_F >= 0, other=float("inf"))
        inner_F = tl.load(inner + place_F, mask=token_F >= 0, other=0.0)
        products_NF = _products(
            key, offset_N, valid_N, key_ND, query, offset_F, token_F >= 0, query_FD, WIDTH, BLOCK_D, CHUNK, PRECISION
        )
        weight_NF, slope_NF = _weights(
            products_NF, log_sum_F[None, :], token_F[None, :], token_N[:, None], valid_N[:, None],
            window, scale, softcap, CAPPED,
        )  # fmt: skip
        change_NF = weight_NF * (upstream_N[:, None] - inner_F[None, :]) * slope_NF
        sum_ND = tl.dot(change_NF.to(query_FD.dtype), query_FD, sum_ND, input_precision=PRECISION)
    gradient = _sample(gradient, segment_first, segment, length, gradient_by_sample, gradient_by_token)
    gradient_N = head.to(tl.int64) * gradient_by_head + token_N.to(tl.int64) * gradient_by_token
    _store_vectors(gradient, gradient_N, there_N, sum_ND * tl.load(factor + segment), WIDTH, BLOCK_D)
