"""The shape of a parameter's block vector in the state: the same for every sharding."""

from __future__ import annotations

import math
from collections.abc import Sequence

from amsf_dist.blocks import Blocks

__all__ = ["line_shape", "vector_shape"]


def line_shape(shape: Sequence[int], blocks: Blocks) -> tuple[int, ...]:
    """The parameter's shape in line order (dims permuted where its weight lies transposed)."""
    return tuple(shape if blocks.order is None else (shape[dim] for dim in blocks.order))


def vector_shape(shape: Sequence[int], blocks: Blocks) -> tuple[int, ...]:
    """Shape of the vector of block moments.

    The parameter's leading dims where a block is what remains of them (a row of a matrix, a row of
    one expert, an element), so that it can be sharded as the parameter is; else one dim.
    """
    line = line_shape(shape, blocks)
    if blocks.kind == "element":
        return line
    num_blocks = blocks.num_blocks(shape)
    for dims in range(1, len(line)):
        if math.prod(line[:dims]) == num_blocks and math.prod(line[dims:]) == blocks.block_numel:
            return line[:dims]
    return (num_blocks,)
