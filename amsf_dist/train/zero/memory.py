"""Bytes per process under ZeRO: of an engine as it is, or of one that is to come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amsf_dist.optimizer import AMSF
from amsf_dist.train.config import Config
from amsf_dist.train.optimizers import FP32
from amsf_dist.train.zero.config import read_deepspeed_file, stage_of

__all__ = ["Held", "held", "predicted", "with_adamw", "with_state"]

_PARTITIONS = (  # DeepSpeed's names for its fp32 weights: ZeRO-3, ZeRO-1 and 2, ZeRO-1 in bf16
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
)


@dataclass(frozen=True)
class Held:
    """What a process holds whatever the optimizer.

    Attributes:
        weights: bytes of the parameters that forward uses: all of them, or a part (ZeRO-3).
        masters: bytes of fp32 weights that lie beside them.
        gradients: bytes of the gradient: whole (ZeRO-1), or a part.
        numel: weights that this process moves.
    """

    weights: int
    masters: int
    gradients: int
    numel: int

    def owners(self) -> dict[str, int]:
        """Return the bytes by owner."""
        return {"weights": self.weights, "masters": self.masters, "gradients": self.gradients}


def held(engine: Any) -> Held:
    """Look at an engine."""
    wrapper = engine.optimizer
    weights = [_here(param) for param in engine.module.parameters()]
    own = {_storage(weight) for weight in weights}
    found = (getattr(wrapper, name, None) for name in _PARTITIONS)
    partitions: list[Tensor] = list(next(group for group in found if group is not None))
    numel = sum(partition.numel() for partition in partitions)
    beside = [partition for partition in partitions if _storage(partition) not in own]
    size = weights[0].element_size()
    whole = sum(getattr(param, "ds_numel", param.numel()) for param in engine.module.parameters())
    return Held(
        weights=sum(weight.numel() for weight in weights) * size,
        masters=sum(partition.numel() for partition in beside) * FP32,
        gradients=(whole if engine.zero_optimization_stage() == 1 else numel) * size,
        numel=numel,
    )


def predicted(config: Config, params: Iterable[Tensor], num_processes: int) -> Held:
    """Work out the same before there is an engine.

    Args:
        config: the job, under `parallel: deepspeed`.
        params: of the whole model.
        num_processes: that share it.

    Raises:
        UserError: if DeepSpeed's file cannot be read.
    """
    stage = stage_of(config, read_deepspeed_file(config))
    size = torch.bfloat16.itemsize if config.precision == "mixed" else FP32
    whole = sum(param.numel() for param in params)
    part = -(-whole // num_processes)
    # DeepSpeed has one copy for both where it finds fp32 weights on the GPU, not on a CPU.
    aliased = stage == 3 and size == FP32 and config.device == "cuda"
    return Held(
        weights=(part if stage == 3 else whole) * size,
        masters=0 if aliased else part * FP32,
        gradients=(whole if stage == 1 else part) * size,
        numel=part,
    )


def with_state(found: Held, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Add the optimizer's state to what is held."""
    if isinstance(optimizer, AMSF):
        lines = optimizer.memory()
        state = {name: size for name, size in lines.items() if name not in ("weights", "total")}
    else:
        state = {
            name: sum(
                line.numel() * line.element_size()
                for lines in optimizer.state.values()
                if (line := lines.get(name)) is not None
            )
            for name in ("exp_avg", "exp_avg_sq")
        }
    return {name: size for name, size in {**found.owners(), **state}.items() if size}


def with_adamw(found: Held) -> dict[str, int]:
    """Add the state that AdamW would have."""
    moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), found.numel * FP32)
    return {name: size for name, size in {**found.owners(), **moments}.items() if size}


def _here(param: Tensor) -> Tensor:
    part: Tensor = getattr(param, "ds_tensor", param)
    return part


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
