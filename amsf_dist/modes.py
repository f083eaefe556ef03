"""What the parameters hold: training weights y, or the average x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amsf_dist import kernels
from amsf_dist.kernels import Holding
from amsf_dist.plan import Plan
from amsf_dist.state import STASH

__all__ = ["averages", "to_average", "to_training"]


def to_average(plan: Plan, state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Copy y aside and write x into the parameters that hold y.

    y cannot be had back from x to the bit: the sum that makes x rounds. So the copy, which costs
    the weights' bytes on this rank while it lasts, is the price of an exact round trip.
    """
    for holding in _holdings(plan, training=True):
        weights = holding.param.detach()
        state[holding.param][STASH] = weights.clone()
        kernels.average_(holding, out=holding.memory(weights))


def to_training(plan: Plan, state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Write y back into the parameters that hold x."""
    for holding in _holdings(plan, training=False):
        weights = holding.memory(holding.param)
        stash = state[holding.param].pop(STASH, None)
        if stash is None:  # a checkpoint written in eval mode whose loader dropped y
            kernels.average_(holding, out=weights, back=True)
        else:
            weights.copy_(holding.memory(stash))


def averages(plan: Plan) -> dict[int, Tensor]:
    """id(parameter) -> x as a new tensor laid out as the parameter, whatever it holds now."""
    found = {}
    for holding in plan.holdings:
        found[id(holding.param)] = x = holding.param.detach().clone()
        if holding.group["train_mode"]:
            kernels.average_(holding, out=holding.memory(x))
    return found


def _holdings(plan: Plan, *, training: bool) -> list[Holding]:
    return [
        holding
        for holding in plan.holdings
        if holding.rule.averaged and holding.group["train_mode"] == training
    ]
