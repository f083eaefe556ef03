"""The second moment of a block, shared by the rules of the Adam family."""

from __future__ import annotations

from torch import Tensor

from amsf_dist.rules.protocol import Scalar

__all__ = ["second_moment", "warmed_up"]


def second_moment(
    exp_avg_sq: Tensor, mean_sq: Tensor, beta2: float, bias_correction2: Scalar, eps: float
) -> tuple[Tensor, Tensor]:
    """docs/algorithm.md (2) and (3): the moving average and one over its bias-corrected root.

    Args:
        exp_avg_sq: [num_blocks].
        mean_sq: [num_blocks].
        beta2: decay of the average.
        bias_correction2: 1 - beta2 ** step.
        eps: added to the root.

    Returns:
        (exp_avg_sq, inverse denominator), both [num_blocks].
    """
    exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * mean_sq
    return exp_avg_sq, ((exp_avg_sq * (1.0 / bias_correction2)).sqrt() + eps).reciprocal()


def warmed_up(lr: Scalar, step: Tensor, warmup_steps: int) -> Tensor:
    """docs/algorithm.md (1): lr * min(1, step / warmup_steps), step counted from 1."""
    if not warmup_steps:
        return lr + 0.0 * step
    return lr * (step / warmup_steps).clamp(max=1.0)
