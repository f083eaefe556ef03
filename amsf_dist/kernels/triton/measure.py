"""Sums of squares of blocks, and what becomes of them: the kernels that come before `move`.

No atomic operation: a sum is formed by one program, or its parts are written side by side and
added in order, so it does not depend on which program comes first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amsf_dist.kernels.triton.arithmetic import FIELDS, is_finite, second_moment
from amsf_dist.kernels.triton.memory import load_number

__all__ = [
    "ADDRESS_FIELDS",
    "COLUMN_FIELDS",
    "COLUMN_PART_FIELDS",
    "MEASURE_FIELDS",
    "MOMENT_FIELDS",
    "PART_FIELDS",
    "PIECE_FIELDS",
    "add_columns",
    "add_parts",
    "advance_moments",
    "measure",
    "measure_columns",
]

_FIELDS = tl.constexpr(FIELDS)

MEASURE_FIELDS = 5
"""piece; first number; numbers per row; rows; address of the first row's sum, fp32."""
PART_FIELDS = 3
"""address of the first part, fp32; parts; address of the sum."""
MOMENT_FIELDS = 5
"""piece; address of the first moment; of the first sum; first scale; blocks."""
COLUMN_FIELDS = 6
"""piece; first number; numbers per row of the matrix; rows; columns; address of their sums."""
COLUMN_PART_FIELDS = 5
"""address of the first part, fp32; parts; numbers from one to the next; columns; address of their
sums."""
PIECE_FIELDS = 10
"""addresses of the error bits, of the line, of its scales, of the moments; numbers per block of the
whole parameter; place in the lane; whether it is a matrix; families of the random numbers of the
weight and of the line; where factored, the first column's place in `scales`."""
ADDRESS_FIELDS = 2
"""of the weight; of the gradient."""

_MEASURE = tl.constexpr(MEASURE_FIELDS)
_PART = tl.constexpr(PART_FIELDS)
_MOMENT = tl.constexpr(MOMENT_FIELDS)
_PIECE = tl.constexpr(PIECE_FIELDS)
_ADDRESS = tl.constexpr(ADDRESS_FIELDS)
_COLUMN = tl.constexpr(COLUMN_FIELDS)
_COLUMN_PART = tl.constexpr(COLUMN_PART_FIELDS)


@triton.jit
def measure(
    items, addresses,
    GRADIENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write the sum of grad**2 of every row of an item; a row is a block, or a part of one.

    Args:
        items: [programs, MEASURE_FIELDS] int64.
        addresses: [pieces, ADDRESS_FIELDS] int64.
        GRADIENT: format of the gradients.
        ROWS: that are read at once; 1 where rows are longer than COLUMNS.
        COLUMNS: numbers of a row that are read at once.
        ALIGNED: whether all addresses, and numbers per row, are multiples of 16 (bytes).
    """
    item = items + tl.program_id(0) * _MEASURE
    gradient = tl.load(addresses + tl.load(item) * _ADDRESS + 1)
    start = tl.load(item + 1)
    numel = tl.load(item + 2).to(tl.int32)
    rows = tl.load(item + 3).to(tl.int32)
    out = tl.load(item + 4).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
        numel = tl.multiple_of(numel, 16)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    for first in range(0, rows, ROWS):
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, numel, COLUMNS):
            mask = (first + row < rows) & (begin + column < numel)
            at = start + ((first + row).to(tl.int64) * numel + (begin + column))
            g = load_number(gradient, at, mask, GRADIENT, ALIGNED)
            total += g * g
        here = first + tl.arange(0, ROWS)
        tl.store(out + here, tl.sum(total, axis=1), mask=here < rows)


@triton.jit
def measure_columns(
    items, addresses,
    GRADIENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write the sums of grad**2 of some columns over some rows.

    Args:
        items: [programs, COLUMN_FIELDS] int64, of at most COLUMNS columns each.
        addresses: see `measure`.
        GRADIENT: see `measure`.
        ROWS: that are read at once.
        COLUMNS: that a program has.
        ALIGNED: see `measure`.
    """
    item = items + tl.program_id(0) * _COLUMN
    gradient = tl.load(addresses + tl.load(item) * _ADDRESS + 1)
    start, numel = tl.load(item + 1), tl.load(item + 2).to(tl.int32)
    rows, columns = tl.load(item + 3).to(tl.int32), tl.load(item + 4).to(tl.int32)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
        numel = tl.multiple_of(numel, 16)
        columns = tl.multiple_of(columns, 16)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        mask = (first + row < rows) & (column < columns)
        at = start + ((first + row).to(tl.int64) * numel + column)
        g = load_number(gradient, at, mask, GRADIENT, ALIGNED)
        total += g * g
    here = tl.arange(0, COLUMNS)
    out = tl.load(item + 5).to(tl.pointer_type(tl.float32))
    tl.store(out + here, tl.sum(total, axis=0), mask=here < columns)


@triton.jit
def add_columns(items, COLUMNS: tl.constexpr):
    """Add up the parts of sums of columns, in order.

    Args:
        items: [programs, COLUMN_PART_FIELDS] int64.
        COLUMNS: at most, per program.
    """
    item = items + tl.program_id(0) * _COLUMN_PART
    parts = tl.load(item).to(tl.pointer_type(tl.float32))
    count, stride = tl.load(item + 1).to(tl.int32), tl.load(item + 2)
    here = tl.arange(0, COLUMNS)
    mask = here < tl.load(item + 3)
    total = tl.zeros([COLUMNS], tl.float32)
    for number in range(0, count):
        total += tl.load(parts + number * stride + here, mask=mask, other=0.0)
    tl.store(tl.load(item + 4).to(tl.pointer_type(tl.float32)) + here, total, mask=mask)


@triton.jit
def add_parts(items, NUMBERS: tl.constexpr):
    """Add up the parts of sums.

    Args:
        items: [programs, PART_FIELDS] int64.
        NUMBERS: that are read at once.
    """
    item = items + tl.program_id(0) * _PART
    parts = tl.load(item).to(tl.pointer_type(tl.float32))
    count = tl.load(item + 1).to(tl.int32)
    at = tl.arange(0, NUMBERS)
    total = tl.zeros([NUMBERS], tl.float32)
    for begin in range(0, count, NUMBERS):
        total += tl.load(parts + begin + at, mask=begin + at < count, other=0.0)
    tl.store(tl.load(item + 2).to(tl.pointer_type(tl.float32)), tl.sum(total, axis=0))


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
    piece = pieces + tl.load(item) * _PIECE
    at = tl.arange(0, BLOCKS)
    mask = at < tl.load(item + 4)
    moments = tl.load(item + 1).to(tl.pointer_type(tl.float32)) + at
    sums = tl.load(item + 2).to(tl.pointer_type(tl.float32)) + at
    mean_sq = tl.math.div_rn(tl.load(sums, mask=mask, other=0.0), tl.load(piece + 4).to(tl.float32))
    c = coefficients + tl.load(piece + 5) * _FIELDS
    after, scale = second_moment(tl.load(moments, mask=mask, other=0.0), mean_sq, c, CLIP_BLOCKS)
    if BY_BLOCK:
        moves = is_finite(mean_sq)
        scale = tl.where(moves, scale, -1.0)
        mask = mask & moves
        tl.store(scales + tl.load(item + 3) + at, scale, mask=at < tl.load(item + 4))
    else:
        mask = mask & (tl.load(verdict) != 0)
        tl.store(scales + tl.load(item + 3) + at, scale, mask=mask)
    tl.store(moments, after, mask=mask)
