"""Counters advance, and the rule's scalars of a step follow from them.

Gradient release does this for every module: some twenty operations of torch on one number each,
which cost as much as some thousand numbers do. Modules of a group count alike, so what one of them
has worked out serves those after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amsf_dist.kernels.choice import on_host
from amsf_dist.rules import Rule
from amsf_dist.rules.protocol import Coefficients

__all__ = ["Lately", "advance"]

_FEW = 8
"""Parameters: the numbers of more are not looked at one by one."""

_NO_NUMBERS = frozenset(("params", "param_names"))


@dataclass
class Lately:
    """The last step of a group's parameters that all counted alike.

    Attributes:
        before: counters and hyper-parameters.
        after: the counters.
        scalars: of the rule.
    """

    before: tuple[list[float], list[Any]] | None = None
    after: tuple[float, ...] = ()
    scalars: Coefficients = None


def advance(
    rule: Rule,
    group: Mapping[str, Any],
    counters: Mapping[str, Tensor],
    stepping: Sequence[int],
    lately: Lately,
    finite: Tensor | None,
    part: int = 0,
    last: bool = True,
) -> Coefficients:
    """Advance the counters of the parameters that step now.

    Args:
        rule: whose counters they are.
        group: the hyper-parameters.
        counters: name -> [num_params] fp64; changed.
        stepping: which of the parameters have a gradient.
        lately: of the group.
        finite: 0-dim bool; where False no counter moves. None: all move.
        part: how many parts of the step have been added before.
        last: whether this is the last one; no counter moves before that.

    Returns:
        The rule's scalars: [num_params] fp64, or floats equal for all.
    """
    steps = counters["step"]
    everyone = rule.ticks_without_gradient or len(stepping) == len(steps)
    whole = finite is None and everyone and last and not part
    before = _before(rule, group, counters) if whole else None
    if before is not None and before == lately.before:
        for name, value in zip(rule.counters, lately.after, strict=True):
            counters[name].fill_(value)
        return lately.scalars
    if everyone:
        tick = torch.ones_like(steps) if finite is None else finite.to(steps).expand_as(steps)
    else:
        tick = torch.zeros_like(steps)
        for index in stepping:
            tick[index] += 1.0 if finite is None else finite.double()
    begun = (steps > 0).to(tick) if part or not last else None
    if not last:
        counters = {name: vector.clone() for name, vector in counters.items()}
    scalars = rule.advance(counters, tick, group)
    if begun is not None:
        scalars = rule.part(scalars, not part, last, begun)
    if before is not None:
        scalars = type(scalars)(*map(_first, scalars))
        lately.before, lately.scalars = before, scalars
        lately.after = tuple(_first(counters[name]) for name in rule.counters)
    return scalars


def _before(
    rule: Rule, group: Mapping[str, Any], counters: Mapping[str, Tensor]
) -> tuple[list[float], list[Any]] | None:
    """What a step follows from; None where parameters differ, or the host cannot look."""
    steps = counters["step"]
    if len(steps) > _FEW or not on_host(steps.device):
        return None
    found = []
    for name in rule.counters:
        first, *others = counters[name].tolist()
        if any(other != first for other in others):
            return None
        found.append(first)
    numbers = [
        tuple(value) if isinstance(value, list) else value  # which may be changed in place
        for name, value in group.items()
        if name not in _NO_NUMBERS
    ]
    return None if any(isinstance(value, Tensor) for value in numbers) else (found, numbers)


def _first(column: Tensor | float) -> float:
    return float(column[0]) if isinstance(column, Tensor) else column
