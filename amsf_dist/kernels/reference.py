"""The reference kernels: torch operations on tiles small enough to stay in cache.

Every kernel walks the sections of a piece (shards/runs.py): numbers [start, stop) shared equally by
`num_blocks` blocks, seen as a matrix [num_blocks, numel_per_block], so that a block's one number
is broadcast and never written out. Temporaries are a few tiles, whatever the parameter's size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amsf_dist.kernels import factored
from amsf_dist.kernels.draws import Draws
from amsf_dist.kernels.holding import WEIGHT, Holding
from amsf_dist.kernels.tiles import (
    flat_line,
    flat_lines,
    flat_tensors,
    put_all_back,
    put_back,
    tiles,
)
from amsf_dist.rules.protocol import Coefficients, Scalar
from amsf_dist.shards import Piece
from amsf_dist.shards.runs import Section
from amsf_dist.storage import Plain

__all__ = ["assign_", "average_", "move_", "sum_of_squares", "unaverage_"]


def sum_of_squares(holding: Holding) -> None:
    """Add grad**2 of every block this rank sees to its partition's sums (docs/algorithm.md (2)).

    Args:
        holding: has a gradient, of any floating dtype; squared and added in the compute dtype.
    """
    memory = holding.gradient
    for piece in holding.layout.pieces:
        line = flat_line(memory, piece)
        for tile in tiles(piece, memory.device):
            part = line[tile.start : tile.stop].to(holding.compute_dtype)
            if piece.part.elementwise:
                holding.sums[piece.first_sum] += part.square().sum()
            else:
                first = tile.first_block - piece.first_block + piece.first_sum
                sums = holding.sums[first : first + tile.num_blocks]
                squares = part.view(tile.num_blocks, -1).square()
                sums += squares.sum(1)
                if piece.others:
                    factored.add_by_column(holding, piece, tile, squares)


def move_(
    holding: Holding,
    c: Coefficients,
    step: Scalar,
    finite: Tensor | None,
    by_block: bool,
) -> None:
    """Update second moments, weights and lines in place.

    Args:
        holding: has a gradient; its `sums` hold the agreed block sums.
        c: the rule's scalars for this parameter.
        step: its count of steps, this one included: a key of stochastic rounding.
        finite: 0-dim bool on the weights' device: where False nothing changes. None when the host
            knows that all is finite, which saves the comparison.
        by_block: decide block by block instead, from the block's own sum.
    """
    memory, gradient = holding.weight, holding.gradient
    for piece in holding.layout.pieces:
        # also where none of the piece's numbers lie here: its moments may be kept by all its ranks
        scaled = None if piece.part.elementwise else _scale_(holding, piece, c, finite, by_block)
        weight, gradient_line = flat_tensors(memory, piece), flat_line(gradient, piece)
        lines = flat_lines(holding, piece)
        draws = Draws(holding, piece, step)
        for tile in tiles(piece, gradient.device):
            _move_tile_(
                holding,
                piece,
                tile,
                weight,
                gradient_line,
                lines,
                scaled,
                c,
                draws,
                finite,
                by_block,
            )
        put_all_back(memory, piece, weight)
        for line, tensors in zip(holding.lines, lines, strict=True):
            put_all_back(line.tensors, piece, tensors)


def average_(holding: Holding, out: Tensor, weight: tuple[Tensor, ...] | None = None) -> None:
    """Write the evaluation weights x, rounded to nearest.

    Args:
        holding: whose weights y and lines are read.
        out: this rank's memory of a tensor laid out as the parameter, of any floating dtype; may
            be the parameter's own.
        weight: tensors of the weight storage to read y from; None: the holding's.
    """
    dtype, target = holding.compute_dtype, Plain(out.dtype)
    for piece in holding.layout.pieces:
        before, result = flat_tensors(weight or holding.weight, piece), flat_line(out, piece)
        lines = flat_lines(holding, piece)
        for tile in tiles(piece, out.device):
            span = slice(tile.start, tile.stop)
            y = holding.weight_storage.load(before, span, dtype)
            x = holding.rule.to_x(y, _load(holding, lines, span), holding.group)
            target.store((result,), span, x)
        put_back(out, piece, result)


def unaverage_(holding: Holding) -> None:
    """Write the training weights y where the parameters hold x; right to rounding only."""
    assign_(holding, holding.memory(holding.param))


def assign_(holding: Holding, x: Tensor) -> None:
    """Write the training weights y whose average is x.

    Args:
        holding: whose weights are written, and whose lines are read.
        x: laid out as this rank's memory, of any floating dtype; may be the parameter's own.
    """
    dtype, source = holding.compute_dtype, Plain(x.dtype)
    for piece in holding.layout.pieces:
        weight, lines = flat_tensors(holding.weight, piece), flat_lines(holding, piece)
        given = flat_line(x, piece)
        for tile in tiles(piece, x.device):
            span = slice(tile.start, tile.stop)
            at_x = source.load((given,), span, dtype)
            y = holding.rule.to_y(at_x, _load(holding, lines, span), holding.group)
            holding.weight_storage.store(weight, span, y)
        put_all_back(holding.weight, piece, weight)


def _load(
    holding: Holding, lines: tuple[tuple[Tensor, ...], ...], span: slice
) -> tuple[Tensor, ...]:
    return tuple(
        line.storage.load(tensors, span, holding.compute_dtype)
        for line, tensors in zip(holding.lines, lines, strict=True)
    )


class _Scaled(NamedTuple):
    """The gradient's factor and where to apply it, for the piece's blocks."""

    scale: Tensor
    finite: Tensor | None  # as `scale`, or 0-dim, or None: everywhere
    columns: Tensor | None = None  # a second factor, one per column


def _scale_(
    holding: Holding, piece: Piece, c: Coefficients, finite: Tensor | None, by_block: bool
) -> _Scaled:
    """Update the second moments of the piece's blocks."""
    if piece.others:
        rows, columns, finite = factored.scales_(holding, piece, c, finite, by_block)
        return _Scaled(rows, finite, columns)
    moments = holding.exp_avg_sq[piece.first_block : piece.first_block + piece.num_blocks]
    mean_sq = holding.sums[piece.first_sum : piece.first_sum + piece.num_sums]
    mean_sq = mean_sq / piece.part.blocks.block_numel
    if by_block:
        finite = mean_sq.isfinite()
    after, scale = holding.rule.block_scale(moments, mean_sq, c)
    moments.copy_(after if finite is None else torch.where(finite, after, moments))
    return _Scaled(scale, finite)


def _move_tile_(
    holding: Holding,
    piece: Piece,
    tile: Section,
    weight: tuple[Tensor, ...],
    gradient: Tensor,
    lines: tuple[tuple[Tensor, ...], ...],
    scaled: _Scaled | None,
    c: Coefficients,
    draws: Draws,
    finite: Tensor | None,
    by_block: bool,
) -> None:
    rule, dtype = holding.rule, holding.compute_dtype
    span = slice(tile.start, tile.stop)
    shape = (tile.num_blocks, -1)
    g = gradient[span].to(dtype).view(shape)
    blocks = slice(tile.first_block, tile.first_block + tile.num_blocks)
    if scaled is None:
        squared = g.square()
        if by_block:
            finite = squared.isfinite()
        before = holding.exp_avg_sq[blocks].view(shape)
        moment, scale = rule.block_scale(before, squared, c)
        before.copy_(moment if finite is None else torch.where(finite, moment, before))
    else:
        here = slice(blocks.start - piece.first_block, blocks.stop - piece.first_block)
        scale, finite = scaled.scale[here].view(-1, 1), scaled.finite
        if finite is not None and finite.dim():
            finite = finite[here].view(-1, 1)
        if scaled.columns is not None:
            scale = scale * factored.by_column(piece, tile, scaled.columns)

    y = holding.weight_storage.load(weight, span, dtype).view(shape)
    decays = holding.group["decay"] == "all" or len(piece.part.shape) >= 2
    before_lines = tuple(values.view(shape) for values in _load(holding, lines, span))
    moved, moved_lines = rule.move(y, g, scale, before_lines, decays, c)
    if finite is not None:
        moved = torch.where(finite, moved, y)
        moved_lines = tuple(
            torch.where(finite, after, before)
            for after, before in zip(moved_lines, before_lines, strict=True)
        )
    holding.weight_storage.store(weight, span, moved.view(-1), draws.of(WEIGHT, tile))
    for name, line, tensors, values in zip(
        rule.lines, holding.lines, lines, moved_lines, strict=True
    ):
        line.storage.store(tensors, span, values.view(-1), draws.of(name, tile))
