"""fp32 masters -> the weights that forward uses: what DeepSpeed does only after a step."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["publish"]


@torch.no_grad()
def publish(wrapper: Any) -> None:
    """Bring masters into the model; collective, every rank must call it.

    Args:
        wrapper: `engine.optimizer`. Without ZeRO in fp32 it is the optimizer: nothing to do.
    """
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        wrapper._partition_all_parameters()
        for number in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(number)
        if wrapper.persistent_parameters:  # small ones that stay gathered between steps
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
        wrapper.invalidate_secondary_tensor()
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_groups"):
        for model, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for param, master in zip(model, masters, strict=True):
                param.data.copy_(master.data)
