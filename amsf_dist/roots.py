"""Square roots that are the same everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["root"]


def root(values: Tensor) -> Tensor:
    """The square root, rounded to nearest.

    C++ rounds it so. torch's fp32 root on a CPU is now and then the neighbour; the root in fp64,
    rounded once more, is right.

    Args:
        values: [...] fp32 or fp64.
    """
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return values.sqrt()
    return values.double().sqrt_().to(torch.float32)
