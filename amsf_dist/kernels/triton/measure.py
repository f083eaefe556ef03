"""Sums of squares of blocks and of columns: the kernels that come first.

No atomic operation: a sum is formed by one program, or its parts are written side by side and
added in order, so it does not depend on which program comes first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amsf_dist.kernels.triton.memory import load_number

__all__ = [
    "ADDRESS_FIELDS",
    "COLUMN_FIELDS",
    "COLUMN_PART_FIELDS",
    "MEASURE_FIELDS",
    "PART_FIELDS",
    "add_columns",
    "add_parts",
    "measure",
    "measure_columns",
]

MEASURE_FIELDS = 5
"""piece; first number; numbers per row; rows; address of the first row's sum, fp32."""
PART_FIELDS = 3
"""address of the first part, fp32; parts; address of the sum."""
COLUMN_FIELDS = 6
"""piece; first number; numbers per row of the matrix; rows; columns; address of their sums."""
COLUMN_PART_FIELDS = 5
"""address of the first part, fp32; parts; numbers from one to the next; columns; address of their
sums."""
ADDRESS_FIELDS = 2
"""of the weight; of the gradient."""

_MEASURE = tl.constexpr(MEASURE_FIELDS)
_PART = tl.constexpr(PART_FIELDS)
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
