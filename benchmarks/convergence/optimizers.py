"""The optimizers of the study, each from its own package, behind one small face."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from amsf_dist import AMSF
from amsf_dist.train.config import AdamWConfig
from amsf_dist.train.optimizers import adamw_for, warmup_cosine

__all__ = ["BUILDERS", "Cosine", "averaged", "set_learning_rate"]

WEIGHT_DECAY = 0.1  # on matrices, for all
Cosine = AdamWConfig  # warm-up in a line, then half a cosine down to zero


def adamw(model: nn.Module, options: dict[str, Any], seed: int) -> torch.optim.Optimizer:
    """`torch.optim.AdamW`."""
    return adamw_for(cosine_of(options), list(model.named_parameters()))


def adam_mini(model: nn.Module, options: dict[str, Any], seed: int) -> torch.optim.Optimizer:
    """`adam_mini.Adam_mini`; it leaves norms without decay by itself."""
    from adam_mini import Adam_mini

    config = model.config
    return Adam_mini(
        model.named_parameters(),
        lr=options["lr"],
        betas=tuple(options["betas"]),
        eps=options.get("eps", 1e-8),
        weight_decay=WEIGHT_DECAY,
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        verbose=False,
    )


def adamw_schedule_free(
    model: nn.Module, options: dict[str, Any], seed: int
) -> torch.optim.Optimizer:
    """`schedulefree.AdamWScheduleFree`."""
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(_by_dimensions(model), **options)


def amsf(model: nn.Module, options: dict[str, Any], seed: int) -> torch.optim.Optimizer:
    """AMSF; the seed is that of rounding at random."""
    return AMSF(model, **options, weight_decay=WEIGHT_DECAY, decay="matrices", seed=seed)


def flash_adamw(model: nn.Module, options: dict[str, Any], seed: int) -> torch.optim.Optimizer:
    """`flashoptim.FlashAdamW`, on bf16 weights; its kernels need a GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("FlashAdamW's kernels need a CUDA device, and there is none")
    from flashoptim import FlashAdamW

    own = {key: value for key, value in options.items() if key != "warmup_steps"}
    return FlashAdamW(_by_dimensions(model), **own)


def portable_flash_adamw(
    model: nn.Module, options: dict[str, Any], seed: int
) -> torch.optim.Optimizer:
    """`pytorch_optimizer.FlashAdamW`, the same in torch operations: 8 error bits, 8-bit moments."""
    from pytorch_optimizer import FlashAdamW

    own = {key: value for key, value in options.items() if key != "warmup_steps"}
    return FlashAdamW(_by_dimensions(model), **own, master_weight_bits=24)


BUILDERS: dict[str, Callable[[nn.Module, dict[str, Any], int], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adam_mini": adam_mini,
    "adamw_schedule_free": adamw_schedule_free,
    "amsf": amsf,
    "flash_adamw": flash_adamw,
    "portable_flash_adamw": portable_flash_adamw,
}
_UNDER_COSINE = ("adamw", "adam_mini", "flash_adamw", "portable_flash_adamw")


def set_learning_rate(
    optimizer: torch.optim.Optimizer, name: str, options: dict[str, Any], step: int, steps: int
) -> None:
    """Set the learning rate of a step (from 0) for those that follow a cosine."""
    if name in _UNDER_COSINE:
        schedule = cosine_of(options)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * warmup_cosine(schedule, step, steps)


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The parameters are those to evaluate: x for the schedule-free ones, else as they are."""
    if isinstance(optimizer, AMSF):
        with optimizer.averaged_parameters():
            yield
    elif hasattr(optimizer, "eval"):
        optimizer.eval()
        yield
        optimizer.train()
    else:
        yield


def cosine_of(options: dict[str, Any]) -> AdamWConfig:
    """The schedule's numbers, checked."""
    return AdamWConfig(**{**options, "betas": list(options["betas"])}, weight_decay=WEIGHT_DECAY)


def _by_dimensions(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
