"""What a state dict says of the tensors that its state lies over: enough to load it anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from amsf_dist.kernels import Holding
from amsf_dist.shards import Flats, vector_shape

__all__ = ["describe"]


def describe(holding: Holding, flats: Flats) -> list[dict[str, Any]]:
    """One record per parameter in a tensor.

    Args:
        holding: of the tensor.
        flats: which parts of which parameters lie in flat ones.

    Returns:
        name, shape; offset in the tensor, start and stop in the parameter (row-major, as stored);
        block_numel; first_moment in the tensor's block vector, num_moments there, and first_block,
        the block of the parameter that the first of them belongs to; moment_shape, of the whole
        vector in a state dict of one process.
    """
    return list(_records(holding, flats))


def _records(holding: Holding, flats: Flats) -> Iterator[dict[str, Any]]:
    slices = flats.get(holding.param)
    for number, piece in enumerate(holding.layout.pieces):
        offset, start, stop = 0, 0, math.prod(piece.part.shape)
        if slices is not None:
            here = slices[number]
            offset, start, stop = here.offset, here.start, here.stop
        size = piece.part.blocks.block_numel
        yield {
            "name": piece.part.name,
            "shape": piece.part.shape,
            "offset": offset,
            "start": start,
            "stop": stop,
            "block_numel": size,
            "first_moment": piece.first_block,
            "num_moments": piece.num_blocks,
            "moment_shape": vector_shape(piece.part.shape, piece.part.blocks),
            "first_block": 0 if piece.boxes or slices is None else start // size,
        }
