"""What is measured on a trained model, and how much of it rounding explains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from amsf_dist.doctor.reference import Compute, Reference

__all__ = ["Distance", "counters_of", "distance_from", "place_between"]

_COUNTERS = ("step", "k", "lr_max", "weight_sum")  # AMSF's, and the names that others use


@dataclass(frozen=True)
class Distance:
    """How far a tensor is from where it should be, as a part of the way that it has gone."""

    error: float
    allowed: float
    name: str

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains it."""
        return self.error <= self.allowed


def _tolerance(compute: Compute, block_numel: int, state_storage: str) -> float:
    """The distance that rounding explains.

    fp32: 4e-6 is seen. Half precision: gradients are added up over ranks and micro-batches in that
    precision. A block of many numbers hardly feels it: 2 epsilon are seen. Where the sum nearly
    cancels, the relative error of an element is a multiple of epsilon, which an update that is
    normalized by elements feels in full: 13 epsilon are seen. Sums over blocks that are not
    reduced make 14 and more, and only in blocks of many numbers. State in 16 bits or fewer: the
    gap, of which a part enters every update, is rounded once per step; bf16 makes 2e-4.
    """
    state = 0.0 if state_storage in ("auto", "fp32") else 2 * torch.finfo(torch.bfloat16).eps
    if compute.dtype is None:
        return 1e-4 + state
    return state + (4 if block_numel > 1 else 32) * torch.finfo(compute.dtype).eps


def distance_from(
    weights: Mapping[str, Tensor],
    goal: Mapping[str, Tensor],
    reference: Reference,
    compute: Compute,
) -> Distance:
    """Of the tensor that is the farthest off; what casting to half precision explains left out."""
    half = torch.finfo(compute.dtype).eps / 2 if compute.cast and compute.dtype else 0.0
    found = Distance(0.0, 1.0, "")
    for name, there in goal.items():
        aim, begin = there.cpu(), reference.start[name].cpu()
        beyond = (weights[name].double() - aim).abs() - half * aim.abs()
        error = float(beyond.clamp(min=0.0).norm() / (aim - begin).norm())
        storage = reference.options["state_storage"]
        allowed = _tolerance(compute, reference.block_numel[name], storage)
        here = Distance(error if error == error else math.inf, allowed, name)
        found = max(found, here, key=lambda distance: distance.error / distance.allowed)
    return found


def place_between(
    at_y: Mapping[str, Tensor], at_x: Mapping[str, Tensor], reference: Reference
) -> float:
    """How far the weights have gone from y to x: 0 at y, 1 at x; rounding averages out."""
    gone = whole = 0.0
    for name, y in reference.y.items():
        way = (reference.x[name] - y).cpu()
        gone += float(((at_x[name].double() - at_y[name].double()) * way).sum())
        whole += float(way.square().sum())
    return gone / whole


def counters_of(optimizer: torch.optim.Optimizer) -> dict[str, set[float]]:
    """Counter -> all values that an optimizer has of it, in its state and in its groups."""
    found: dict[str, set[float]] = {}
    for entries in (*optimizer.state.values(), *optimizer.param_groups):
        for key in _COUNTERS:
            if isinstance(value := entries.get(key), Tensor | int | float):
                found.setdefault(key, set()).add(round(float(value), 12))
    return found
