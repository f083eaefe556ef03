"""Storages by name: how numbers lie in memory between two steps."""

from __future__ import annotations

import torch

from amsf_dist.storage.plain import Plain
from amsf_dist.storage.protocol import Storage

__all__ = ["Storage", "state_storage", "weight_storage"]


def weight_storage(name: str, dtype: torch.dtype) -> Storage:
    """The storage of weights.

    Args:
        name: checked value of `weight_storage=`.
        dtype: of the parameter.
    """
    return Plain(dtype)


def state_storage(name: str, dtype: torch.dtype) -> Storage:
    """The storage of the rule's lines.

    Args:
        name: checked value of `state_storage=`; "auto" is "fp32". "fp32" means full precision:
            fp64 for fp64 parameters, so that they lose nothing.
        dtype: of the parameter.
    """
    if name == "bf16":
        return Plain(torch.bfloat16)
    return Plain(torch.promote_types(dtype, torch.float32))
