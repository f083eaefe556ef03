"""The optimizer of a config: AMSF at a constant learning rate, or AdamW under a cosine."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from amsf_dist.hyper import Hyper
from amsf_dist.optimizer import AMSF
from amsf_dist.train.config import AdamWConfig, Config
from amsf_dist.train.errors import UserError

__all__ = [
    "ADAMW_COMPUTED",
    "FP32",
    "LABELS",
    "ORDINARY",
    "adamw_for",
    "adamw_fp32",
    "amsf_options",
    "build_optimizer",
    "check_amsf",
    "evaluation_weights",
    "local_elements",
    "memory_by_owner",
    "set_learning_rate",
    "warmup_cosine",
]

ADAMW_COMPUTED = "AdamW fp32 (computed)"
LABELS = {"amsf": "AMSF", "adamw": "AdamW + cosine"}
ORDINARY = "AMSF without release (computed)"
FP32 = 4  # bytes


def amsf_options(config: Config) -> dict[str, Any]:
    """Return the arguments of AMSF for a job: its `amsf` section and how it clips.

    DeepSpeed clips by the norm itself. So does the job where the step is to be `deterministic`,
    for AMSF refuses that: sums of all gradients depend on the number of processes in their last
    bits.
    """
    if config.clip != "norm":
        return {**config.amsf, "clip": config.clip}
    outside = config.parallel == "deepspeed" or (
        config.amsf.get("deterministic") is True and not config.release
    )
    if outside or config.max_grad_norm is None:
        return config.amsf
    return {**config.amsf, "clip": "norm", "max_norm": config.max_grad_norm}


def check_amsf(config: Config) -> None:
    """Check the arguments of AMSF without a model.

    Raises:
        UserError: naming the key, the value, the range and the cure.
    """
    try:
        Hyper.of(amsf_options(config))
    except (TypeError, ValueError) as error:
        raise UserError(f"amsf: {error}") from None


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer for a model that is already on its device and sharded.

    Raises:
        UserError: if AMSF refuses an argument.
    """
    if config.optimizer == "amsf":
        try:
            return AMSF(model, **amsf_options(config))
        except (TypeError, ValueError) as error:
            raise UserError(f"amsf: {error}") from None
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return adamw_for(config.adamw, named)


def adamw_for(options: AdamWConfig, named: Sequence[tuple[str, torch.Tensor]]) -> torch.optim.AdamW:
    """Build AdamW for parameters, of which those without weight decay are a group of their own."""
    decayed = [options.decay == "all" or _dimensions(param) >= 2 for _, param in named]
    matrices = [pair for pair, decays in zip(named, decayed, strict=True) if decays]
    vectors = [pair for pair, decays in zip(named, decayed, strict=True) if not decays]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.lr,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    """Set the learning rate of a step (counted from 0) where it follows a schedule.

    A function of the step alone, so a resumed run needs no scheduler state. AMSF has no schedule,
    and a warmup of its own.
    """
    if config.optimizer == "adamw":
        for group in optimizer.param_groups:
            group["lr"] = config.adamw.lr * warmup_cosine(config.adamw, step, config.steps)


def warmup_cosine(options: AdamWConfig, step: int, steps: int) -> float:
    """Return the factor on the learning rate: a line up to 1, then half a cosine down."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps + 1) / max(1, steps - options.warmup_steps)
    low = options.final_lr_fraction
    return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def evaluation_weights(optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which the parameters are those to evaluate: x for AMSF."""
    return (
        optimizer.averaged_parameters() if isinstance(optimizer, AMSF) else contextlib.nullcontext()
    )


def adamw_fp32(numel: int) -> dict[str, int]:
    """Return AdamW's bytes by owner for a number of elements: everything in fp32."""
    return dict.fromkeys(("weights", "gradients", "exp_avg", "exp_avg_sq"), numel * FP32)


def memory_by_owner(
    optimizer: torch.optim.Optimizer, gradients: int | None = None
) -> dict[str, int]:
    """Return the bytes on this rank of weights, gradients and each line of optimizer state.

    Args:
        optimizer: AMSF or AdamW.
        gradients: bytes of those that are there at once; None: all.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    weights = sum(_bytes(param) for param in params)
    if isinstance(optimizer, AMSF):
        owners = {name: size for name, size in optimizer.memory().items() if name != "total"}
    else:
        owners = {"weights": weights}
        for name in ("exp_avg", "exp_avg_sq"):
            states = (optimizer.state[param].get(name) for param in params)
            owners[name] = sum(_bytes(state) for state in states if state is not None)
    # A gradient has the dtype and the shard of its parameter.
    gradients = weights if gradients is None else gradients
    owners = {"weights": owners.pop("weights"), "gradients": gradients, **owners}
    return {name: size for name, size in owners.items() if size}


def local_elements(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of weights that this rank holds."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return sum(_local(param).numel() for param in params)


def _dimensions(param: torch.Tensor) -> int:
    # deepspeed.zero.Init leaves an empty tensor and its shape beside it
    return len(getattr(param, "ds_shape", param.shape))


def _bytes(tensor: torch.Tensor) -> int:
    local = _local(tensor)
    return local.numel() * local.element_size()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
