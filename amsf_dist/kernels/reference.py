"""The reference kernels: torch operations on tiles small enough to stay in cache.

Every kernel walks the sections of a piece (shards/runs.py): numbers [start, stop) shared equally by
`num_blocks` blocks, seen as a matrix [num_blocks, numel_per_block], so that a block's one number
is broadcast and never written out. Temporaries are a few tiles, whatever the parameter's size.
"""

from __future__ import annotations

from torch import Tensor

from amsf_dist.kernels import factored
from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.lines import (
    flat_line,
    flat_lines,
    flat_tensors,
    load_lines,
    put_all_back,
    put_back,
)
from amsf_dist.kernels.tiles import tiles
from amsf_dist.storage import Plain

__all__ = ["assign_", "average_", "sum_of_squares", "unaverage_"]


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


def average_(holding: Holding, out: Tensor, weight: tuple[Tensor, ...] | None = None) -> None:
    """Write the evaluation weights x, rounded to nearest.

    Args:
        holding: whose weights y and lines are read.
        out: this rank's memory of a tensor laid out as the parameter, of any floating dtype; may
            be the parameter's own.
        weight: tensors of the weight storage to read y from; None: the holding's.
    """
    dtype, target = holding.compute_dtype, Plain(out.dtype)
    for piece, tiles_here in holding.tiled:
        before, result = flat_tensors(weight or holding.weight, piece), flat_line(out, piece)
        lines = flat_lines(holding, piece)
        for tile in tiles_here:
            y = holding.weight_storage.load(before, tile.span, dtype)
            x = holding.rule.to_x(y, load_lines(holding, lines, tile), holding.group)
            target.store((result,), tile.span, x)
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
    for piece, tiles_here in holding.tiled:
        weight, lines = flat_tensors(holding.weight, piece), flat_lines(holding, piece)
        given = flat_line(x, piece)
        for tile in tiles_here:
            at_x = source.load((given,), tile.span, dtype)
            y = holding.rule.to_y(at_x, load_lines(holding, lines, tile), holding.group)
            holding.weight_storage.store(weight, tile.span, y)
        put_all_back(holding.weight, piece, weight)
