"""Weights and lines move: one launch for all tiles of a class, in place.

Nothing here may be run twice on the same memory: no autotuning.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amsf_dist.kernels.triton.arithmetic import FIELDS, is_finite, moved, second_moment
from amsf_dist.kernels.triton.measure import ADDRESS_FIELDS
from amsf_dist.kernels.triton.memory import (
    load_line,
    load_number,
    load_weight,
    store_line,
    store_weight,
)
from amsf_dist.kernels.triton.moments import PIECE_FIELDS
from amsf_dist.kernels.triton.noise import key_of

__all__ = ["MOVE_FIELDS", "measure_and_move", "move"]

MOVE_FIELDS = 8
"""piece; first number; numbers; place of the first in the parameter's line; its block (in `scales`,
or in the piece's moments where every element is one); numbers per block here; numbers of the first
block before it; its group in the scales of the line."""

_FIELDS = tl.constexpr(FIELDS)
_MOVE = tl.constexpr(MOVE_FIELDS)
_PIECE = tl.constexpr(PIECE_FIELDS)
_ADDRESS = tl.constexpr(ADDRESS_FIELDS)


@triton.jit
def _scale_of(scales, block, before, block_numel, offsets, mask, TILE: tl.constexpr):
    """Factors of the gradient at `offsets` of a tile.

    `block`: of the first number; `before`: numbers of that block before it.
    """
    left = block_numel - before
    if left >= TILE:  # all of it is one block
        scale = tl.load(scales + block) + tl.zeros_like(offsets).to(tl.float32)
    else:
        beyond = offsets - left
        # a division of whole numbers below 2**20, for which fp32 is exact
        further = (beyond.to(tl.float32) + 0.5) * (1.0 / block_numel.to(tl.float32))
        at = tl.where(beyond < 0, 0, 1 + tl.floor(further).to(tl.int32))
        scale = tl.load(scales + block + at, mask=mask, other=0.0)
    return scale


@triton.jit
def _tile(
    piece, address, coefficients, factors, steps, first_moment, scale, by_column, start, place,
    group, offsets, groups, numel,
    RULE: tl.constexpr, ELEMENT: tl.constexpr, STORAGE: tl.constexpr, FORMAT: tl.constexpr,
    LINE: tl.constexpr, GRADIENT: tl.constexpr, DECAY_ALL: tl.constexpr,
    CLIP_BLOCKS: tl.constexpr, BY_BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Move one tile: [groups, 64] numbers from `start` on.

    `scale`: factor of the gradient, negative where nothing moves; `by_column`: another one.
    """
    row = tl.load(piece + 4)
    c = coefficients + row * _FIELDS
    weights, gradients = tl.load(address), tl.load(address + 1)
    errors, lines, line_scales = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    at, mask, there = start + offsets, offsets < numel, groups * 64 < numel
    g = load_number(gradients, at, mask, GRADIENT, ALIGNED) * tl.load(factors + row)
    y = load_weight(weights, errors, at, mask, STORAGE, FORMAT, ALIGNED)
    line, line_scale = load_line(lines, line_scales, at, group + groups, mask, there, LINE, ALIGNED)
    if ELEMENT:
        moments, element = tl.load(piece + 3), first_moment + offsets
        before = load_number(moments, element, mask, "fp32", ALIGNED)
        squared = g * g
        after, scale = second_moment(before, squared, c, CLIP_BLOCKS)
        moves = is_finite(squared)
        stored = mask
        if BY_BLOCK:
            stored = mask & moves
        pointer = moments.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        tl.store(pointer + element, after, mask=stored)
    else:
        moves = scale >= 0
        scale = scale * by_column
    decays = tl.load(piece + 5) != 0
    if DECAY_ALL:
        decays = decays | True
    weight, new = moved(y, g, scale, line, decays, c, RULE)
    if BY_BLOCK:
        weight, new = tl.where(moves, weight, y), tl.where(moves, new, line)
    step = tl.load(steps + row).to(tl.int64)
    store_weight(
        weights, errors, at, mask, weight, key_of(tl.load(piece + 6), step), place, offsets,
        STORAGE, FORMAT, ALIGNED,
    )  # fmt: skip
    store_line(
        lines, line_scales, at, group + groups, mask, there, new, line_scale, moves,
        key_of(tl.load(piece + 7), step), place, offsets, LINE, not BY_BLOCK, ALIGNED,
    )  # fmt: skip


@triton.jit
def move(
    items, pieces, addresses, coefficients, factors, steps, verdict, scales,
    RULE: tl.constexpr, ELEMENT: tl.constexpr, FACTORED: tl.constexpr, WHOLE: tl.constexpr,
    STORAGE: tl.constexpr, FORMAT: tl.constexpr, LINE: tl.constexpr, GRADIENT: tl.constexpr,
    DECAY_ALL: tl.constexpr, CLIP_BLOCKS: tl.constexpr, BY_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Move the weights and lines of some tiles.

    Args:
        items: [items, MOVE_FIELDS] int64, of at most TILES tiles each; a program for every tile.
        pieces: [pieces, PIECE_FIELDS] int64.
        addresses: [pieces, ADDRESS_FIELDS] int64.
        coefficients: [lane's parameters, FIELDS] fp32.
        factors: [lane's parameters] fp32, of the gradients.
        steps: [lane's parameters] fp64, keys of the random numbers.
        verdict: bool on the device; where False nothing changes, unless BY_BLOCK.
        scales: of the blocks, from moments.py.
        RULE: its name.
        ELEMENT: whether every element is a block.
        FACTORED: whether columns have factors too, in `scales`.
        WHOLE: whether no block begins within 64 numbers that are moved together.
        STORAGE: of the weights, see memory.py.
        FORMAT: of the weights.
        LINE: storage of the line.
        GRADIENT: format of the gradients.
        DECAY_ALL: whether weight decay is for all parameters; if not, for matrices.
        CLIP_BLOCKS: see `second_moment`.
        BY_BLOCK: every block decides for itself.
        ALIGNED: whether all addresses, and numbers, are multiples of 16 (bytes), and places of 8.
        TILES: at most, per item.
        GROUPS: of 64 numbers, per tile.
    """
    if not BY_BLOCK:
        if tl.load(verdict) == 0:
            return
    item = items + (tl.program_id(0) // TILES) * _MOVE
    skipped = (tl.program_id(0) % TILES) * (GROUPS * 64)
    numel = tl.load(item + 2).to(tl.int32) - skipped
    if numel <= 0:
        return
    number = tl.load(item)
    start, place = tl.load(item + 1) + skipped, tl.load(item + 3) + skipped
    block, group = tl.load(item + 4), tl.load(item + 7) + skipped // 64
    if ALIGNED:
        start = tl.multiple_of(start, 16)
        numel = tl.multiple_of(numel, 16)
    groups = tl.arange(0, GROUPS)[:, None]
    offsets = groups * 64 + tl.arange(0, 64)[None, :]
    mask = offsets < numel
    if ELEMENT:
        block += skipped
        if ALIGNED:
            block = tl.multiple_of(block, 16)
        scale, by_column = 0.0, 1.0
    else:
        block_numel = tl.load(item + 5).to(tl.int32)
        before = tl.load(item + 6).to(tl.int32) + skipped
        block += before // block_numel
        at, there = offsets, mask
        if WHOLE:  # one factor for each group
            at, there = groups * 64, groups * 64 < numel
        inside = before % block_numel
        scale = _scale_of(scales, block, inside, block_numel, at, there, GROUPS * 64)
        by_column = 1.0
        if FACTORED:
            column = (inside + at) % block_numel
            if WHOLE:
                column += tl.arange(0, 64)[None, :]
            columns = scales + tl.load(pieces + number * _PIECE + 8)
            by_column = tl.load(columns + column, mask=mask, other=0.0)
    _tile(
        pieces + number * _PIECE, addresses + number * _ADDRESS, coefficients, factors, steps,
        block, scale, by_column, start, place, group, offsets, groups, numel,
        RULE, ELEMENT, STORAGE, FORMAT, LINE, GRADIENT, DECAY_ALL, CLIP_BLOCKS, BY_BLOCK, ALIGNED,
    )  # fmt: skip


@triton.jit
def measure_and_move(
    items, pieces, addresses, coefficients, factors, steps,
    RULE: tl.constexpr, STORAGE: tl.constexpr, FORMAT: tl.constexpr, LINE: tl.constexpr,
    GRADIENT: tl.constexpr, DECAY_ALL: tl.constexpr, CLIP_BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Measure a block and move it, if its gradient is finite; a program for every block.

    A block's gradient is read from memory once: the second time it is still in a cache.

    Args:
        items: [items, MOVE_FIELDS] int64, of at most TILES whole blocks each; lines in groups have
            whole groups in every block.
        pieces: see `move`; as are all other arguments.
        addresses: see `move`.
        coefficients: see `move`.
        factors: see `move`; all are 1.
        steps: see `move`.
        RULE: see `move`.
        STORAGE: see `move`.
        FORMAT: see `move`.
        LINE: see `move`.
        GRADIENT: see `move`.
        DECAY_ALL: see `move`.
        CLIP_BLOCKS: see `move`.
        ALIGNED: see `move`.
        TILES: at most, per item.
        GROUPS: of 64 numbers, that are read at once.
    """
    item = items + (tl.program_id(0) // TILES) * _MOVE
    number = tl.program_id(0) % TILES
    block_numel = tl.load(item + 5).to(tl.int32)
    skipped = number * block_numel
    if skipped >= tl.load(item + 2).to(tl.int32):
        return
    piece = pieces + tl.load(item) * _PIECE
    address = addresses + tl.load(item) * _ADDRESS
    start, place = tl.load(item + 1) + skipped, tl.load(item + 3) + skipped
    group = tl.load(item + 7) + skipped // 64
    if ALIGNED:
        start = tl.multiple_of(start, 16)
        block_numel = tl.multiple_of(block_numel, 16)
    groups = tl.arange(0, GROUPS)[:, None]
    offsets = groups * 64 + tl.arange(0, 64)[None, :]

    total = tl.zeros([GROUPS, 64], tl.float32)
    gradients = tl.load(address + 1)
    for begin in range(0, block_numel, GROUPS * 64):
        mask = offsets < block_numel - begin
        g = load_number(gradients, start + begin + offsets, mask, GRADIENT, ALIGNED)
        total += g * g
    square = tl.sum(tl.sum(total, axis=1), axis=0)
    tl.store(tl.load(item + 6).to(tl.pointer_type(tl.float32)) + number, square)
    mean_sq = tl.math.div_rn(square, block_numel.to(tl.float32))
    if is_finite(mean_sq):
        moment = tl.load(piece + 3).to(tl.pointer_type(tl.float32)) + tl.load(item + 4) + number
        c = coefficients + tl.load(piece + 4) * _FIELDS
        after, scale = second_moment(tl.load(moment), mean_sq, c, CLIP_BLOCKS)
        tl.store(moment, after)
        for begin in range(0, block_numel, GROUPS * 64):
            _tile(
                piece, address, coefficients, factors, steps, 0, scale, 1.0,
                start + begin, place + begin, group + begin // 64,
                offsets, groups, block_numel - begin,
                RULE, False, STORAGE, FORMAT, LINE, GRADIENT, DECAY_ALL, CLIP_BLOCKS, False,
                ALIGNED,
            )  # fmt: skip
