"""What a state dict says of the tensors that its state lies over: enough to load it anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from amsf_dist.kernels import Holding
from amsf_dist.shards import Flats, Piece, vector_shape
from amsf_dist.state import MOMENTS

__all__ = ["describe"]


def describe(holding: Holding, flats: Flats) -> list[dict[str, Any]]:
    """One record per parameter in a tensor.

    Args:
        holding: of the tensor.
        flats: which parts of which parameters lie in flat ones.

    Returns:
        name, shape; offset in the tensor, start and stop in the parameter (row-major, as stored);
        moments: key -> block_numel; first_moment in the tensor's block vector, num_moments there,
        and first_block, the block of the parameter that the first of them belongs to; shape of the
        whole vector in a state dict of one process.
    """
    return list(_records(holding, flats))


def _records(holding: Holding, flats: Flats) -> Iterator[dict[str, Any]]:
    slices = flats.get(holding.param)
    for number, piece in enumerate(holding.layout.pieces):
        offset, start, stop = 0, 0, math.prod(piece.part.shape)
        if slices is not None:
            here = slices[number]
            offset, start, stop = here.offset, here.start, here.stop
        yield {
            "name": piece.part.name,
            "shape": piece.part.shape,
            "offset": offset,
            "start": start,
            "stop": stop,
            "moments": {
                key: _moments(cut)
                for key, cut in zip(MOMENTS, (piece, *piece.others), strict=False)
            },
        }


def _moments(piece: Piece) -> dict[str, Any]:
    assert piece.kept is not None
    return {
        "block_numel": piece.part.blocks.block_numel,
        "first_moment": piece.first_block,
        "num_moments": piece.num_blocks,
        "first_block": piece.kept.offsets[0],  # a slice is an interval of blocks, all else whole
        "shape": vector_shape(piece.part.shape, piece.part.blocks),
    }
