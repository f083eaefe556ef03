"""AdamW (arXiv 1711.05101) over blocks: with element blocks AdamW, else Adam-mini (2406.16793)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from amsf_dist.rules.protocol import Scalar
from amsf_dist.rules.second_moment import BlockMoments, warmed_up

__all__ = ["RULE", "Ema"]


class _Coefficients(NamedTuple):
    lr: Scalar  # divided by the bias correction of the first moment
    keep: Scalar  # 1 - lr * weight_decay
    forget1: float  # 1 - beta1, or 0 in a step that has begun
    fresh1: float  # 1 - beta1
    carry2: float  # beta2, or 1 in a step that has begun
    fresh2: float  # 1 - beta2
    bias_correction2: Scalar
    eps: float
    clip_blocks: bool


class Ema(BlockMoments):
    """First moment as an exponential average; docs/algorithm.md (10), (11)."""

    name = "ema"
    lines = ("exp_avg",)
    counters = ("step",)
    averaged = False
    ticks_without_gradient = False

    def advance(
        self, counters: Mapping[str, Tensor], tick: Tensor, group: Mapping[str, Any]
    ) -> _Coefficients:
        """docs/algorithm.md (1) and the bias corrections."""
        beta1, beta2 = group["betas"]
        step = counters["step"].add_(tick)
        lr = warmed_up(group["lr"], step, group["warmup_steps"])
        decay = group["weight_decay"] / (group["max_lr"] if group["decouple_lr"] else 1.0)
        return _Coefficients(
            lr=lr / (1.0 - beta1**step),
            keep=1.0 - lr * decay,
            forget1=1.0 - beta1,
            fresh1=1.0 - beta1,
            carry2=beta2,
            fresh2=1.0 - beta2,
            bias_correction2=1.0 - beta2**step,
            eps=group["eps"],
            clip_blocks=group["clip"] == "block",
        )

    def told(self, counters: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The last step's learning rate, docs/algorithm.md (1)."""
        return {"lr": warmed_up(group["lr"], counters["step"], group["warmup_steps"])}

    def part(self, c: _Coefficients, first: bool, last: bool, begun: Scalar) -> _Coefficients:
        """docs/release.md (16): weights move with the last part (AdamA, arXiv 2305.19982)."""
        if not first:
            c = c._replace(carry2=1.0, forget1=0.0)
        return c if last else c._replace(lr=0.0, keep=1.0)

    def move(
        self,
        weight: Tensor,
        grad: Tensor,
        scale: Tensor,
        lines: tuple[Tensor, ...],
        decays: bool,
        c: _Coefficients,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """docs/algorithm.md (10), (11)."""
        exp_avg = lines[0] + (c.fresh1 * grad - c.forget1 * lines[0])
        if decays:
            weight = c.keep * weight
        return weight - c.lr * (exp_avg * scale), (exp_avg,)

    def to_x(self, weight: Tensor, lines: tuple[Tensor, ...], group: Mapping[str, Any]) -> Tensor:
        """The weights themselves: nothing is averaged."""
        return weight

    to_y = to_x


RULE = Ema()
