"""What a step refuses before anything has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from amsf_dist.groups import names_of

__all__ = ["refuse_gradients", "refuse_replaced"]


def refuse_gradients(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a step whose gradients cannot be used.

    Raises:
        RuntimeError: the parameters hold the average, or a gradient is sparse.
    """
    for group in groups:
        # Whatever has a gradient here: FSDP1 leaves some ranks without any, and where the others
        # raise they must too, or they would wait for them in the all-reduce.
        if not group["train_mode"]:
            raise RuntimeError(
                "step() while the parameters hold the average x: call optimizer.train() before the "
                "forward pass of training"
            )
        for index, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            if param.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{names_of(group)[index] or 'a parameter'}: sparse gradients are not "
                    "supported; build the embedding with sparse=False"
                )


def refuse_replaced(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to train parameters that the model has dropped for others.

    Raises:
        RuntimeError: the model was wrapped, or loaded with assign=True, after the optimizer was
            built; without this it would train nothing, and say nothing.
    """
    present = {id(param) for param in model.parameters()}
    for group in groups:
        for name, param in zip(names_of(group), group["params"], strict=True):
            if id(param) not in present and param.requires_grad:
                raise RuntimeError(
                    f"{name or 'a parameter'} is no longer the model's: it was wrapped "
                    "(fully_shard, FullyShardedDataParallel) or loaded with assign=True after the "
                    "optimizer was built; build AMSF last"
                )
