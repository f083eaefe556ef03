"""One process, DDP, and everything else whose tensors hold whole parameters."""

from __future__ import annotations

from torch import Tensor

from amsf_dist.blocks import Blocks
from amsf_dist.shards.layout import Layout, Piece
from amsf_dist.shards.runs import box_runs
from amsf_dist.shards.vector import line_shape, vector_shape

__all__ = ["replicated"]


def replicated(name: str, param: Tensor, blocks: Blocks) -> Layout:
    """The whole parameter lies here; gradients arrive already averaged, nothing is cut."""
    shape = line_shape(tuple(param.shape), blocks)
    runs = box_runs(shape, [0] * len(shape), shape, blocks.block_numel)
    vector = vector_shape(tuple(param.shape), blocks)
    num_blocks = blocks.num_blocks(param.shape)
    return Layout(
        pieces=(Piece(name, tuple(param.shape), blocks, runs, 0, num_blocks),),
        num_blocks=num_blocks,
        as_state=lambda moments: moments.view(vector),
    )
