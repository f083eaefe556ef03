"""Where the numbers lie: one producer of pieces per sharding system, chosen only here."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from amsf_dist.blocks import Blocks
from amsf_dist.shards.fsdp2 import copy_into, fsdp2
from amsf_dist.shards.layout import Axis, Layout, Piece
from amsf_dist.shards.replicated import replicated

__all__ = ["Axis", "Layout", "Piece", "copy_into", "locate"]


def locate(name: str, param: Tensor, blocks: Blocks) -> Layout:
    """Which numbers of a parameter lie on this rank.

    Args:
        name: canonical name, "" when unknown.
        param: what the optimizer was given; a DTensor under FSDP2 and tensor parallel.
        blocks: how its line is cut.
    """
    if isinstance(param, DTensor):
        return fsdp2(name, param, blocks)
    return replicated(name, param, blocks)
