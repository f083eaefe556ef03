"""The second moment of a block, shared by the rules of the Adam family."""

from __future__ import annotations

import torch
from torch import Tensor

from amsf_dist.roots import root
from amsf_dist.rules.protocol import Coefficients, Scalar

__all__ = ["BlockMoments", "warmed_up"]


class BlockMoments:
    """For rules whose scalars have `carry2`, `fresh2`, `bias_correction2`, `eps`, `clip_blocks`."""

    def block_scale(
        self, exp_avg_sq: Tensor, mean_sq: Tensor, c: Coefficients
    ) -> tuple[Tensor, Tensor]:
        """docs/algorithm.md (2) and (3): the average, and one over its bias-corrected root.

        Args:
            exp_avg_sq: [num_blocks].
            mean_sq: [num_blocks].
            c: the rule's scalars; bias_correction2 is 1 - beta2 ** step. With `clip_blocks` the
                mean square of a block's update is 1 at most.

        Returns:
            (exp_avg_sq, inverse denominator), both [num_blocks].
        """
        exp_avg_sq = c.carry2 * exp_avg_sq + c.fresh2 * mean_sq
        denominator = root(exp_avg_sq * (1.0 / c.bias_correction2))
        scale = (denominator + c.eps).reciprocal()
        if c.clip_blocks:
            scale = torch.minimum(scale, root(mean_sq).reciprocal())
        return exp_avg_sq, scale


def warmed_up(lr: Scalar, step: Tensor, warmup_steps: int) -> Tensor:
    """docs/algorithm.md (1): lr * min(1, step / warmup_steps), step counted from 1."""
    if not warmup_steps:
        return lr + 0.0 * step
    return lr * (step / warmup_steps).clamp(max=1.0)
