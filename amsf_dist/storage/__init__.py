"""Storages by name: how numbers lie in memory between two steps."""

from __future__ import annotations

import torch

from amsf_dist.storage.int8 import Int8
from amsf_dist.storage.kahan import Kahan
from amsf_dist.storage.plain import Plain
from amsf_dist.storage.protocol import Draw, Groups, Storage
from amsf_dist.storage.split import Split
from amsf_dist.storage.stochastic import Stochastic

__all__ = ["Draw", "Groups", "Int8", "Plain", "Storage", "state_storage", "weight_storage"]


def weight_storage(name: str, dtype: torch.dtype) -> Storage:
    """The storage of weights.

    Args:
        name: checked value of `weight_storage=`; "auto" is "bf16+8".
        dtype: of the parameter. fp32 and fp64 need nothing and are kept as they are; "bf16+8" and
            "bf16+16" mean 8 and 16 error bits for fp16 weights too.
    """
    if dtype in (torch.bfloat16, torch.float16):
        if name == "kahan":
            return Kahan(dtype)
        if name in ("auto", "bf16+8", "bf16+16"):
            return Split(dtype, 16 if name == "bf16+16" else 8)
        if name == "stochastic":
            return Stochastic(dtype)
    return Plain(dtype)


def state_storage(name: str, dtype: torch.dtype) -> Storage:
    """The storage of the rule's lines.

    Args:
        name: checked value of `state_storage=`; "auto" is "fp32". "fp32" means full precision:
            fp64 for fp64 parameters, so that they lose nothing.
        dtype: of the parameter.
    """
    if name == "bf16":
        return Stochastic(torch.bfloat16)
    if name == "int8":
        return Int8()
    return Plain(torch.promote_types(dtype, torch.float32))
