"""What exact block sums need of a gradient: maxima and integer sums, neither of which rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from amsf_dist.kernels.holding import Holding, Partition
from amsf_dist.kernels.lines import flat_line
from amsf_dist.kernels.tiles import tiles

__all__ = ["add_scaled_squares", "largest_square"]


def largest_square(holding: Holding, partition: Partition) -> None:
    """Raise `partition.sums` to the largest grad**2 of every block this rank sees.

    Args:
        holding: has a gradient; squared in the compute dtype.
        partition: one of its.
    """
    memory = holding.gradient
    for piece in partition.layout.pieces:
        line = flat_line(memory, piece)
        for tile in tiles(piece, memory.device):
            squares = line[tile.start : tile.stop].to(holding.compute_dtype).square()
            if piece.part.elementwise:
                here, peak = slice(piece.first_sum, piece.first_sum + 1), squares.max().view(1)
            else:
                first = tile.first_block - piece.first_block + piece.first_sum
                here = slice(first, first + tile.num_blocks)
                peak = squares.view(tile.num_blocks, -1).amax(1)
            partition.sums[here] = torch.maximum(partition.sums[here], peak)


def add_scaled_squares(holding: Holding, partition: Partition, scale: Tensor, out: Tensor) -> None:
    """Add grad**2 * scale, each rounded to a whole number, to the blocks' integer sums.

    Args:
        holding: has a gradient.
        partition: one of its.
        scale: [layout.num_sums] fp64, powers of two.
        out: [layout.num_sums] int64.
    """
    memory = holding.gradient
    for piece in partition.layout.pieces:
        if piece.part.elementwise:  # used where they are made, never summed
            continue
        line = flat_line(memory, piece)
        for tile in tiles(piece, memory.device):
            first = tile.first_block - piece.first_block + piece.first_sum
            blocks = slice(first, first + tile.num_blocks)
            part = line[tile.start : tile.stop].double().view(tile.num_blocks, -1)
            scaled = part.square().mul_(scale[blocks].view(-1, 1)).round_()
            out[blocks] += scaled.nan_to_num_(0.0, 0.0, 0.0).to(torch.int64).sum(1)
