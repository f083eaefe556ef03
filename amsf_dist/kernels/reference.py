"""The reference kernels: torch operations on tiles small enough to stay in cache.

Every kernel walks the sections of a piece (shards/runs.py): numbers [start, stop) shared equally by
`num_blocks` blocks, seen as a matrix [num_blocks, numel_per_block], so that a block's one number
is broadcast and never written out. Temporaries are a few tiles, whatever the parameter's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amsf_dist.kernels.holding import Holding
from amsf_dist.rules.protocol import Coefficients
from amsf_dist.shards import Piece
from amsf_dist.shards.runs import Section

__all__ = ["average_", "move_", "sum_of_squares"]

# Numbers per tile. On a CPU the handful of fp32 temporaries then stays in the second-level cache;
# on a GPU every tile is some launches, so it is as large as memory peaks allow (64 MiB in fp32).
_TILE_NUMEL = {"cpu": 64 * 1024}
_TILE_NUMEL_DEVICE = 16 * 1024 * 1024


def sum_of_squares(holding: Holding) -> None:
    """Add grad**2 of every block this rank sees to `holding.sums` (docs/algorithm.md (2)).

    Args:
        holding: has a gradient, of any floating dtype; squared and added in the compute dtype.
    """
    memory = holding.gradient
    for piece in holding.layout.pieces:
        line = _line(memory, piece)
        for tile in _tiles(piece, memory.device):
            part = line[tile.start : tile.stop].to(holding.compute_dtype)
            if holding.elementwise:
                holding.sums += part.square().sum()
            else:
                blocks = slice(tile.first_block, tile.first_block + tile.num_blocks)
                holding.sums[blocks] += part.view(tile.num_blocks, -1).square().sum(1)


def move_(holding: Holding, c: Coefficients, finite: Tensor | None, by_block: bool) -> None:
    """Update second moments, weights and lines in place.

    Args:
        holding: has a gradient; its `sums` hold the agreed block sums.
        c: the rule's scalars for this parameter.
        finite: 0-dim bool on the weights' device: where False nothing changes. None when the host
            knows that all is finite, which saves the comparison.
        by_block: decide block by block instead, from the block's own sum.
    """
    memory, gradient = holding.memory(holding.param), holding.gradient
    for piece in holding.layout.pieces:
        # also where none of the piece's numbers lie here: its moments may be kept by all its ranks
        scaled = None if holding.elementwise else _scale_(holding, piece, c, finite, by_block)
        weight, gradient_line = _line(memory, piece), _line(gradient, piece)
        lines = _lines(holding, piece)
        for tile in _tiles(piece, memory.device):
            _move_tile_(
                holding,
                tile,
                weight,
                gradient_line,
                lines,
                scaled,
                piece.first_block,
                c,
                finite,
                by_block,
            )
        _put_back(memory, piece, weight)
        for line, tensors in zip(holding.lines, lines, strict=True):
            for tensor, flat in zip(line.tensors, tensors, strict=True):
                _put_back(tensor, piece, flat)


def average_(
    holding: Holding, group: Mapping[str, Any], out: Tensor, *, back: bool = False
) -> None:
    """Write the evaluation weights x, or back from them the training weights y.

    Args:
        holding: whose weights and lines are read.
        group: hyper-parameters.
        out: this rank's memory of a tensor laid out as the parameter; may be the parameter's own.
        back: read x and write y; right to rounding only.
    """
    memory, dtype = holding.memory(holding.param), holding.compute_dtype
    convert = holding.rule.to_y if back else holding.rule.to_x
    for piece in holding.layout.pieces:
        weight, result = _line(memory, piece), _line(out, piece)
        lines = _lines(holding, piece)
        for tile in _tiles(piece, memory.device):
            span = slice(tile.start, tile.stop)
            values = _load(holding, lines, span)
            before = holding.weight_storage.load((weight,), span, dtype)
            holding.weight_storage.store((result,), span, convert(before, values, group))
        _put_back(out, piece, result)


def _lines(holding: Holding, piece: Piece) -> tuple[tuple[Tensor, ...], ...]:
    """Memory of the rule's lines, flat in line order."""
    return tuple(tuple(_line(tensor, piece) for tensor in line.tensors) for line in holding.lines)


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


def _scale_(
    holding: Holding, piece: Piece, c: Coefficients, finite: Tensor | None, by_block: bool
) -> _Scaled:
    """Update the second moments of the piece's blocks."""
    moments = holding.exp_avg_sq[piece.first_block : piece.first_block + piece.num_blocks]
    mean_sq = holding.sums[piece.first_block : piece.first_block + piece.num_blocks]
    mean_sq = mean_sq / piece.blocks.block_numel
    if by_block:
        finite = mean_sq.isfinite()
    after, scale = holding.rule.block_scale(moments, mean_sq, c)
    moments.copy_(after if finite is None else torch.where(finite, after, moments))
    return _Scaled(scale, finite)


def _move_tile_(
    holding: Holding,
    tile: Section,
    weight: Tensor,
    gradient: Tensor,
    lines: tuple[tuple[Tensor, ...], ...],
    scaled: _Scaled | None,
    first_block: int,
    c: Coefficients,
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
        here = slice(blocks.start - first_block, blocks.stop - first_block)
        scale, finite = scaled.scale[here].view(-1, 1), scaled.finite
        if finite is not None and finite.dim():
            finite = finite[here].view(-1, 1)

    y = holding.weight_storage.load((weight,), span, dtype).view(shape)
    before_lines = tuple(values.view(shape) for values in _load(holding, lines, span))
    moved, moved_lines = rule.move(y, g, scale, before_lines, holding.decays, c)
    if finite is not None:
        moved = torch.where(finite, moved, y)
        moved_lines = tuple(
            torch.where(finite, after, before)
            for after, before in zip(moved_lines, before_lines, strict=True)
        )
    holding.weight_storage.store((weight,), span, moved.view(-1))
    for line, tensors, values in zip(holding.lines, lines, moved_lines, strict=True):
        line.storage.store(tensors, span, values.view(-1))


def _tiles(piece: Piece, device: torch.device) -> Iterator[Section]:
    """The piece's sections, cut to at most a tile: whole blocks together, or a part of one."""
    tile_numel = _TILE_NUMEL.get(device.type, _TILE_NUMEL_DEVICE)
    for run in piece.runs:
        for section in run.sections():
            numel = (section.stop - section.start) // section.num_blocks
            if numel > tile_numel:
                for block in range(section.num_blocks):
                    first = section.start + block * numel
                    for start in range(first, first + numel, tile_numel):
                        stop = min(start + tile_numel, first + numel)
                        yield Section(start, stop, section.first_block + block, 1)
            else:
                step = tile_numel // numel
                for block in range(0, section.num_blocks, step):
                    count = min(step, section.num_blocks - block)
                    start = section.start + block * numel
                    yield Section(start, start + count * numel, section.first_block + block, count)


def _line(memory: Tensor, piece: Piece) -> Tensor:
    """Memory as the flat line the runs count in; a copy where the weight lies in another order."""
    order = piece.blocks.order
    return (memory if order is None else memory.permute(order)).reshape(-1)


def _put_back(memory: Tensor, piece: Piece, line: Tensor) -> None:
    """Write a line back when `_line` had to copy."""
    if line.data_ptr() != memory.data_ptr():
        order = piece.blocks.order
        view = memory if order is None else memory.permute(order)
        view.copy_(line.view(view.shape))
