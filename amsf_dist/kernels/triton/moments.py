"""What becomes of the sums: second moments, and the factors of the gradient that follow."""

from __future__ import annotations

import triton
import triton.language as tl

from amsf_dist.kernels.triton.arithmetic import FIELDS, is_finite, second_moment

__all__ = [
    "MATRIX_FIELDS",
    "MOMENT_FIELDS",
    "PIECE_FIELDS",
    "advance_matrices",
    "advance_moments",
]

MOMENT_FIELDS = 6
"""piece; address of the first moment; of the first sum; first scale; blocks; numbers per block of
the whole parameter."""
MATRIX_FIELDS = 10
"""The same, of rows or of columns; addresses of the moment and of the sum of the whole matrix; its
numbers; whether these are the rows."""
PIECE_FIELDS = 9
"""addresses of the error bits, of the line, of its scales, of the moments; place in the lane;
whether it is a matrix; families of the random numbers of the weight and of the line; where
factored, the first column's place in `scales`."""

_FIELDS = tl.constexpr(FIELDS)
_MOMENT = tl.constexpr(MOMENT_FIELDS)
_MATRIX = tl.constexpr(MATRIX_FIELDS)
_PIECE = tl.constexpr(PIECE_FIELDS)


@triton.jit
def advance_moments(
    items, pieces, coefficients, verdict, scales,
    CLIP_BLOCKS: tl.constexpr, BY_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Advance the moments of blocks by their sums, and write the factors of the gradient.

    Args:
        items: [programs, MOMENT_FIELDS] int64.
        pieces: [pieces, PIECE_FIELDS] int64.
        coefficients: [lane's parameters, FIELDS] fp32.
        verdict: bool on the device; where False nothing changes, unless BY_BLOCK.
        scales: fp32, written; -1 where BY_BLOCK and the block's gradient is not finite.
        CLIP_BLOCKS: see `second_moment`.
        BY_BLOCK: every block decides for itself.
        BLOCKS: per program.
    """
    item = items + tl.program_id(0) * _MOMENT
    c = coefficients + tl.load(pieces + tl.load(item) * _PIECE + 4) * _FIELDS
    at = tl.arange(0, BLOCKS)
    mask = at < tl.load(item + 4)
    moments = tl.load(item + 1).to(tl.pointer_type(tl.float32)) + at
    mean_sq = _mean_sq(item, at, mask)
    after, scale = second_moment(tl.load(moments, mask=mask, other=0.0), mean_sq, c, CLIP_BLOCKS)
    moves = is_finite(mean_sq) if BY_BLOCK else tl.load(verdict) != 0
    if BY_BLOCK:
        scale = tl.where(moves, scale, -1.0)
    tl.store(scales + tl.load(item + 3) + at, scale, mask=mask)
    tl.store(moments, after, mask=mask & moves)


@triton.jit
def advance_matrices(
    items, pieces, coefficients, verdict, scales,
    CLIP_BLOCKS: tl.constexpr, BY_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The same for rows and columns of factored matrices, each of which is one block.

    The moments of whole matrices are as they were before the step, and stay so: these are items of
    `advance_moments`, which comes after it. Source text: `factored.scales_`.

    Args:
        items: [programs, MATRIX_FIELDS] int64.
        pieces: see `advance_moments`, as the next two.
        coefficients: of the parameters.
        verdict: of the step.
        scales: written; -1 for all rows where BY_BLOCK and the matrix' gradient is not finite.
        CLIP_BLOCKS: a matrix is one block to clip.
        BY_BLOCK: every matrix decides for itself.
        BLOCKS: rows or columns per program.
    """
    item = items + tl.program_id(0) * _MATRIX
    c = coefficients + tl.load(pieces + tl.load(item) * _PIECE + 4) * _FIELDS
    at = tl.arange(0, BLOCKS)
    whole = tl.load(tl.load(item + 7).to(tl.pointer_type(tl.float32)) + 0 * at)
    whole = tl.math.div_rn(whole, tl.load(item + 8).to(tl.float32))
    before = tl.load(tl.load(item + 6).to(tl.pointer_type(tl.float32)) + 0 * at)
    _, mean = second_moment(before, whole, c, False)

    mask = at < tl.load(item + 4)
    moments = tl.load(item + 1).to(tl.pointer_type(tl.float32)) + at
    mean_sq = _mean_sq(item, at, mask)
    after, scale = second_moment(tl.load(moments, mask=mask, other=0.0), mean_sq, c, False)
    is_row = tl.load(item + 9)
    limit = 1.0
    if CLIP_BLOCKS:
        limit = tl.math.div_rn(tl.math.div_rn(1.0, tl.math.sqrt_rn(whole)), mean)
        limit = tl.where(limit > 1.0, 1.0, limit)  # NaN stays
    scale = tl.where(is_row != 0, tl.math.div_rn(scale, mean), scale * limit)
    scale = tl.where(is_finite(scale), scale, 0.0)  # without eps: 0 times infinity
    moves = is_finite(whole) if BY_BLOCK else tl.load(verdict) != 0
    if BY_BLOCK:
        scale = tl.where(moves | (is_row == 0), scale, -1.0)
    tl.store(scales + tl.load(item + 3) + at, scale, mask=mask)
    tl.store(moments, after, mask=mask & moves)


@triton.jit
def _mean_sq(item, at, mask):
    """Of an item's blocks; its fields are those of MOMENT_FIELDS."""
    sums = tl.load(item + 2).to(tl.pointer_type(tl.float32)) + at
    return tl.math.div_rn(tl.load(sums, mask=mask, other=0.0), tl.load(item + 5).to(tl.float32))
