"""The three device kernels of token similarity; `triton.py` in this folder launches them and explains the design.

Tokens are padded to whole tiles. The vectors over tokens (inverse norms, weights) include the padding and are 0 there,
as at tokens that are masked or have norm 0; the features of such tokens are never read. One program writes each element
of a result, and sums in a fixed order.

Suffixes: R rows and C columns of a tile (tokens both), K channels of a step, J tokens of a step, D channels of a tile.
"""

import triton
import triton.language as tl

CHANGING = ["tokens", "top"]  # change from call to call: one binary serves all values


@triton.jit(do_not_specialize=["tokens"])
def prepare(
    student, teacher, mask, weight, inverse_student, inverse_teacher, clean_weight, factor,
    tokens, padded, width, teacher_width,
    student_by_sample, student_by_token, teacher_by_sample, teacher_by_token,
    SMALLEST: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """For each token 1 / |s|, 1 / |t|, w, and w / |s|. Grid: blocks of tokens x samples."""
    sample = tl.program_id(1).to(tl.int64)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid_R = row_R < tokens
    if MASKED:
        valid_R = valid_R & (tl.load(mask + sample * tokens + row_R, mask=valid_R, other=0) != 0)
    student_R = _inverse_length(
        student + sample * student_by_sample, row_R, valid_R, width, student_by_token, SMALLEST, ROWS, CHANNELS
    )
    teacher_R = _inverse_length(
        teacher + sample * teacher_by_sample, row_R, valid_R, teacher_width, teacher_by_token, SMALLEST, ROWS, CHANNELS
    )
    weight_R = valid_R.to(tl.float32)
    if WEIGHTED:
        weight_R = tl.load(weight + sample * tokens + row_R, mask=valid_R, other=0.0).to(tl.float32)
    place_R = sample * padded + row_R
    there_R = row_R < padded
    tl.store(inverse_student + place_R, student_R, mask=there_R)
    tl.store(inverse_teacher + place_R, teacher_R, mask=there_R)
    tl.store(clean_weight + place_R, weight_R, mask=there_R)
    tl.store(factor + place_R, weight_R * student_R, mask=there_R)


@triton.jit
def _inverse_length(
    features, row_R, valid_R, width, by_token, SMALLEST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    channel_K = tl.arange(0, CHANNELS)
    place_RK = features + row_R.to(tl.int64)[:, None] * by_token + channel_K[None, :]
    squares_RK = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, width, CHANNELS):
        there_RK = valid_R[:, None] & (channel_K < width - first)[None, :]
        value_RK = tl.load(place_RK + first, mask=there_RK, other=0.0).to(tl.float32)
        squares_RK += value_RK * value_RK
    length_R = tl.sqrt(tl.sum(squares_RK, 1))
    short_R = length_R <= SMALLEST
    inverse_R = tl.where(valid_R & ~short_R, 1.0 / tl.where(short_R, 1.0, length_R), 0.0)
    # A norm that is not finite must give NaN, which the user sees; the token must not be skipped.
    return tl.where(length_R == float("inf"), float("nan"), inverse_R)


@triton.jit(do_not_specialize=CHANGING)
def differences(
    student, teacher, inverse_student, inverse_teacher, weight, factor, extent, panel, sums,
    top, height, tokens, padded, width, teacher_width, sums_by_kind,
    student_by_sample, student_by_token, teacher_by_sample, teacher_by_token,
    GRADIENT: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of D = cos(s) - cos(t): times the factor of the columns for the panel, and summed along the rows.

    Grid: tiles of the panel's rows x tiles of all columns x samples. In the square on the diagonal only the upper
    half is computed; its tiles also serve as their mirror images.
    """
    first_block = top // BLOCK
    row_block = first_block + tl.program_id(0)
    column_block = tl.program_id(1)
    if (column_block >= first_block) & (column_block < row_block):
        return
    sample = tl.program_id(2).to(tl.int64)
    row_R = row_block * BLOCK + tl.arange(0, BLOCK)
    column_C = column_block * BLOCK + tl.arange(0, BLOCK)
    empty = tl.maximum(row_block, column_block) * BLOCK >= tl.load(extent + sample)
    teacher_RC = _cosines(
        teacher + sample * teacher_by_sample, inverse_teacher + sample * padded, row_R, column_C,
        tl.where(empty, 0, teacher_width), teacher_by_token, TEACHER_PRECISION, BLOCK, CHANNELS,
    )  # fmt: skip
    student_RC = _cosines(
        student + sample * student_by_sample, inverse_student + sample * padded, row_R, column_C,
        tl.where(empty, 0, width), student_by_token, PRECISION, BLOCK, CHANNELS,
    )  # fmt: skip
    difference_RC = student_RC - teacher_RC
    weight_R, weight_C = tl.load(weight + sample * padded + row_R), tl.load(weight + sample * padded + column_C)
    panel += sample * height * padded
    sums += sample * (padded // BLOCK) * height
    weighted_RC = difference_RC * weight_C[None, :]
    place_R = sums + column_block * height + row_R - top
    tl.store(place_R, tl.sum(weighted_RC * difference_RC, 1) * weight_R)
    if GRADIENT:
        tl.store(place_R + sums_by_kind, tl.sum(weighted_RC * student_RC, 1))
        factor_C = tl.load(factor + sample * padded + column_C)
        _put(panel, difference_RC * factor_C[None, :], row_R - top, column_C, padded)
    if (column_block > row_block) & (column_block < first_block + height // BLOCK):
        weighted_RC = difference_RC * weight_R[:, None]
        place_C = sums + row_block * height + column_C - top
        tl.store(place_C, tl.sum(weighted_RC * difference_RC, 0) * weight_C)
        if GRADIENT:
            tl.store(place_C + sums_by_kind, tl.sum(weighted_RC * student_RC, 0))
            factor_R = tl.load(factor + sample * padded + row_R)
            _put(panel, tl.trans(difference_RC * factor_R[:, None]), column_C - top, row_R, padded)


@triton.jit
def _cosines(
    features, inverse, row_R, column_C, width, by_token,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Multiply the raw features in float32 and scale by the norms last, so that nothing is rounded in between."""
    inverse_R, inverse_C = tl.load(inverse + row_R), tl.load(inverse + column_C)
    channel_K = tl.arange(0, CHANNELS)
    left_RK = features + row_R.to(tl.int64)[:, None] * by_token + channel_K[None, :]
    right_KC = features + column_C.to(tl.int64)[None, :] * by_token + channel_K[:, None]
    sum_RC = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, width, CHANNELS):
        there_K = channel_K < width - first
        value_RK = tl.load(left_RK, mask=(inverse_R != 0)[:, None] & there_K[None, :], other=0.0)
        value_KC = tl.load(right_KC, mask=(inverse_C != 0)[None, :] & there_K[:, None], other=0.0)
        sum_RC = tl.dot(value_RK, value_KC, sum_RC, input_precision=PRECISION)
        left_RK += CHANNELS
        right_KC += CHANNELS
    return sum_RC * inverse_R[:, None] * inverse_C[None, :]


@triton.jit
def _put(panel, value_RC, place_R, column_C, padded):
    place_RC = panel + place_R.to(tl.int64)[:, None] * padded + column_C[None, :]
    tl.store(place_RC, value_RC.to(panel.dtype.element_ty))


@triton.jit(do_not_specialize=CHANGING)
def gradients(
    panel, student, inverse, weight, along, extent, share, undo, gradient,
    top, height, tokens, padded, width, student_by_sample, student_by_token,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute a tile of dl/dx: the panel times the features, and the gradient of the normalization.

    Grid: blocks of the panel's rows x blocks of channels x samples.
    """
    sample = tl.program_id(2).to(tl.int64)
    place_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_R = top + place_R
    channel_D = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside_D = channel_D < width
    step_J = tl.arange(0, DEPTH)
    student += sample * student_by_sample
    inverse += sample * padded
    reach = tl.load(extent + sample)
    reach = tl.where(top + tl.program_id(0) * ROWS < reach, reach, 0)
    left_RJ = panel + (sample * height + place_R)[:, None] * padded + step_J[None, :]
    right_JD = student + step_J.to(tl.int64)[:, None] * student_by_token + channel_D[None, :]
    sum_RD = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, reach, DEPTH):
        there_J = first + step_J < tokens
        if MASKED:
            there_J = tl.load(inverse + first + step_J) != 0
        value_JD = tl.load(right_JD, mask=there_J[:, None] & inside_D[None, :], other=0.0)
        sum_RD = tl.dot(tl.load(left_RJ), value_JD, sum_RD, input_precision=PRECISION)
        left_RJ += DEPTH
        right_JD += DEPTH * student_by_token
    inverse_R = tl.load(inverse + row_R)
    own_RD = student + row_R.to(tl.int64)[:, None] * student_by_token + channel_D[None, :]
    unit_RD = tl.load(own_RD, mask=(inverse_R != 0)[:, None] & inside_D[None, :], other=0.0).to(tl.float32)
    unit_RD *= inverse_R[:, None]
    along_R = tl.load(along + sample * height + place_R)
    factor_R = tl.load(weight + sample * padded + row_R) * inverse_R * tl.load(share + sample)
    result_RD = (sum_RD * tl.load(undo + sample) - along_R[:, None] * unit_RD) * factor_R[:, None]
    out_RD = gradient + (sample * tokens + row_R)[:, None] * width + channel_D[None, :]
    tl.store(out_RD, result_RD.to(gradient.dtype.element_ty), mask=(row_R < tokens)[:, None] & inside_D[None, :])
