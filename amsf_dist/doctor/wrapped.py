"""What every wrapper can be asked for, whoever built it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from amsf_dist.blocks import canonical_name
from amsf_dist.doctor.reference import Compute

__all__ = [
    "Factory",
    "OtherOptimizer",
    "Wrapped",
    "call",
    "check_named",
    "insists",
    "whole_weights",
]

Factory = Callable[..., torch.optim.Optimizer]
"""Called with a model or its parameters, and AMSF's arguments by name."""


class OtherOptimizer(Exception):
    """Another optimizer would train in place of the one that was asked for."""


def check_named(named: str | None) -> None:
    """Look at the optimizer's name in a DeepSpeed JSON, which knows it in this spelling alone.

    Raises:
        OtherOptimizer: it is another one.
    """
    if named not in (None, "AMSF"):
        raise OtherOptimizer(f"this configuration trains with {named}, not with AMSF")


def insists(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed would take its own CPU optimizer in place of one that is handed over.

    Args:
        config: DeepSpeed's JSON.
    """
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    offloads = offload.get("device", "none") not in (None, "none")
    return offloads and bool(config.get("zero_force_ds_cpu_optimizer", True))


class Wrapped(Protocol):
    """A tiny model under a wrapper, with an optimizer that trains it.

    Attributes:
        name: of the wrapper's class.
        details: stage, precision, offload: what decides which code runs.
        optimizer: the one at the bottom, that moves the weights.
        expected: the one that was handed over, or the class that the configuration names.
        options: AMSF's arguments.
        notes: what differs from the configuration.
        clip: largest norm of the gradient; 0: none.
        micro_batches: of one rank in one step.
    """

    name: str
    details: str
    optimizer: torch.optim.Optimizer
    expected: Any
    options: dict[str, Any]
    notes: tuple[str, ...]
    clip: float
    micro_batches: int

    @property
    def compute(self) -> Compute:
        """How forward and backward run in the next step."""

    def step(self, parts: Sequence[Tensor]) -> bool:
        """Train on this rank's micro-batches; False if the wrapper skipped the step."""

    def weights(self) -> dict[str, Tensor]:
        """Canonical name -> the whole parameter that forward uses, on the CPU."""

    def eval(self) -> None:
        """What a user calls before evaluating."""

    def train(self) -> None:
        """What a user calls before training on."""

    def save(self, folder: Path) -> None:
        """What a user calls to save everything."""

    def load(self, folder: Path) -> None:
        """What a user calls to go on from there."""

    def close(self) -> None:
        """Let another one be built in this process."""


def call(optimizer: Any, mode: str) -> None:
    """Call `optimizer.eval()` or `optimizer.train()`, if it has two modes."""
    if hasattr(optimizer, mode):
        getattr(optimizer, mode)()


@torch.no_grad()
def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> the whole parameter that forward uses, under any wrapper."""
    params = list(model.parameters())
    if any(hasattr(param, "ds_id") for param in params):
        import deepspeed

        whole: Any = deepspeed.zero.GatheredParameters(params)
    elif any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        whole = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    else:
        whole = nullcontext()
    with whole:
        return {
            canonical_name(name): _whole(param).cpu().clone()
            for name, param in model.named_parameters()
        }


def _whole(param: Tensor) -> Tensor:
    value = param.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
