"""Rows and columns of a matrix at once: v_ij = r_i c_j / m (docs/algorithm.md (12) to (14)).

The piece is walked by rows, as every other; a tile's columns lie side by side in the vector of the
columns. Its `others` are the columns and the whole, `Blocks.others` says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amsf_dist.kernels.holding import Holding, Partition
from amsf_dist.kernels.tiles import Tile
from amsf_dist.kernels.transfer import spread
from amsf_dist.roots import root
from amsf_dist.rules.protocol import Coefficients
from amsf_dist.shards import Piece

__all__ = ["add_by_column", "by_column", "column_of", "scales_", "second_moments"]


def add_by_column(holding: Holding, piece: Piece, tile: Tile, squares: Tensor) -> None:
    """Add a tile's squares to the sums of its columns and of the whole.

    Args:
        holding: its second partition is the columns, its third the whole.
        piece: of the first.
        tile: of it.
        squares: [rows, columns] of the tile.
    """
    columns, mean = piece.others
    by_column = squares.sum(0)
    first = column_of(piece, tile) - columns.first_block + columns.first_sum
    holding.partitions[1].sums[first : first + len(by_column)] += by_column
    holding.partitions[2].sums[mean.first_sum] += by_column.sum()


def scales_(
    holding: Holding, piece: Piece, c: Coefficients, finite: Tensor | None, by_block: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Update the three second moments of a matrix.

    Args:
        holding: its `sums` are agreed on.
        piece: of the first partition.
        c: the rule's scalars.
        finite: 0-dim bool; where False nothing changes. None: all is finite.
        by_block: the matrix decides by itself, as a whole: every rank has the sum of all of it.

    Returns:
        [rows] and [columns] factors of the gradient, and 0-dim whether to apply them.
    """
    ways = list(zip(holding.partitions, (piece, *piece.others), strict=True))
    means = [_mean_sq(partition, cut) for partition, cut in ways]
    if by_block:
        finite = means[-1].isfinite().all()
    scales = []
    apart = c._replace(clip_blocks=False)  # the matrix is one block to clip
    for (partition, cut), mean_sq in zip(ways, means, strict=True):
        moments = partition.moments[cut.first_block : cut.first_block + cut.num_blocks]
        after, scale = holding.rule.block_scale(moments, mean_sq, apart)
        moments.copy_(after if finite is None else torch.where(finite, after, moments))
        scales.append(scale)
    rows, columns, mean = scales
    if c.clip_blocks:
        columns = columns * (root(means[-1]).reciprocal() / mean).clamp(max=1.0)
    # without eps an all-zero row would be 0 times infinity
    return (rows / mean).nan_to_num_(0.0, 0.0), columns.nan_to_num(0.0, 0.0), finite


def by_column(piece: Piece, tile: Tile, columns: Tensor) -> Tensor:
    """The tile's part of the piece's columns.

    Args:
        piece: cut by rows.
        tile: of it.
        columns: [columns of the piece], a number for each.
    """
    first = column_of(piece, tile) - piece.others[0].first_block
    return columns[first : first + (tile.stop - tile.start) // tile.num_blocks]


def second_moments(holding: Holding) -> Tensor:
    """The second moment of every element, laid out as this rank's memory."""
    moments, *others = (spread(holding, partition) for partition in holding.partitions)
    if not others:
        return moments
    columns, mean = others  # zero where a part of the tensor is no matrix
    return torch.where(mean > 0, moments * (columns / mean), moments)


def column_of(piece: Piece, tile: Tile) -> int:
    """Where a tile's first column is in the tensor's vector of columns."""
    columns = piece.others[0]
    assert columns.kept is not None
    return columns.kept.position_of(piece.place(tile.start) % columns.part.num_blocks)


def _mean_sq(partition: Partition, cut: Piece) -> Tensor:
    sums = partition.sums[cut.first_sum : cut.first_sum + cut.num_sums]
    return sums / cut.part.blocks.block_numel
