"""Values of tensors that may be DTensors: all of them, and copied into a tensor of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["copy_into", "whole"]


def copy_into(ours: Tensor, saved: Any) -> None:
    """Copy a saved value, whole or sharded in any way, into a live tensor of the same global shape.

    Args:
        ours: plain or DTensor; keeps its dtype and sharding.
        saved: number, plain tensor (the whole of it) or DTensor.
    """
    saved = torch.as_tensor(saved)
    if isinstance(ours, DTensor):
        if not isinstance(saved, DTensor):
            device = ours.to_local().device
            saved = distribute_tensor(
                saved.to(device), ours.device_mesh, ours.placements, src_data_rank=None
            )
        elif saved.placements != ours.placements:
            saved = saved.redistribute(ours.device_mesh, ours.placements)
        ours.to_local().copy_(saved.to_local())
    else:
        ours.copy_(whole(saved))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every rank of its mesh must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
