"""Factors of the gradients: by the norm of all of them, or of each parameter's own.

`clip="block"` is not here: it needs nothing but a block's sum and moment (rules/second_moment.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from amsf_dist.lane import Lane

__all__ = ["COUNTER", "NEEDS_NORMS", "clip_", "expected_square"]

NEEDS_NORMS = ("norm", "tensor")
"""Values of `clip` for which ranks agree on the norm of every parameter's gradient."""
COUNTER = "grad_norm"
"""In the state: what a parameter's gradients were like before."""

_SLACK, _DECAY = 1.05, 0.98  # of AdaGC (arXiv 2502.11034)
_RUNNING_DECAY = 0.9


def clip_(
    lanes: Sequence[Lane], squares: Sequence[Tensor], total: Tensor, expected: Tensor | None
) -> Tensor:
    """Set every tensor's factor.

    Vectors over a lane throughout: an operation for each tensor would take a GPU's host longer than
    the step.

    Args:
        lanes: of a unit.
        squares: per lane [parameters] squared norms of their gradients, agreed on.
        total: 0-dim, of all gradients that are there.
        expected: 0-dim, squared norm of all gradients, going by those of earlier steps; None: all
            gradients are there, `total` is exact.
    """
    factors: list[Tensor] = []
    for lane, own in zip(lanes, squares, strict=True):
        clip = lane.group["clip"]
        if clip not in NEEDS_NORMS:
            factors.append(total.new_ones(len(own), dtype=torch.float64))
            continue
        before = lane.counters.values[COUNTER]
        own = own.to(before)
        if clip == "tensor":
            norm = own.sqrt()
            # no history yet, or no gradient: nothing to compare with
            known = (before > 0) & (norm > 0)
            factor = torch.where(known, (_SLACK * before / norm).clamp(max=1.0), 1.0)
            after = torch.where(before > 0, before.lerp(factor * norm, 1.0 - _DECAY), norm)
        else:
            square = total.to(before)
            if expected is not None:
                square = torch.maximum(square, expected.to(before))
            # torch.nn.utils.clip_grad_norm_'s own small number
            limit = lane.group["max_norm"] / (square.sqrt() + 1e-6)
            factor = torch.full_like(before, 1.0) * limit.clamp(max=1.0)
            after = torch.where(before > 0, before.lerp(own, 1.0 - _RUNNING_DECAY), own)
        before.copy_(torch.where(own.isfinite() & (own > 0), after, before))
        factors.append(factor.to(total.device, torch.float64))
        for holding in lane.holdings:
            holding.factors = factor
    return torch.cat(factors)


def expected_square(lanes: Sequence[Lane]) -> Tensor:
    """Squared norm of all gradients, going by those of earlier steps; 0 before there were any."""
    known = [lane.counters.values[COUNTER].sum() for lane in lanes if lane.group["clip"] == "norm"]
    return (
        torch.stack([number.to(known[0]) for number in known]).sum() if known else torch.zeros(())
    )
