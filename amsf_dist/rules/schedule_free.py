"""Schedule-Free averaging over blocks (arXiv 2405.15682), kept as y and the gap e = x - z."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amsf_dist.rules.protocol import Scalar
from amsf_dist.rules.second_moment import BlockMoments, warmed_up

__all__ = ["RULE", "ScheduleFree"]


class _Coefficients(NamedTuple):
    lr: Scalar
    average: Scalar  # beta1 * ckp1
    direct: float  # 1 - beta1
    keep: Scalar  # 1 - ckp1
    decay: Scalar  # weight decay times lr
    carry2: float  # beta2, or 1 in a step that has begun
    fresh2: float  # 1 - beta2
    bias_correction2: Scalar
    eps: float
    clip_blocks: bool


class ScheduleFree(BlockMoments):
    """y' and e' of docs/algorithm.md (6) to (8)."""

    name = "schedule_free"
    lines = ("gap",)
    counters = ("step", "weight_sum", "lr_max")
    averaged = True
    ticks_without_gradient = True

    def advance(
        self, counters: Mapping[str, Tensor], tick: Tensor, group: Mapping[str, Any]
    ) -> _Coefficients:
        """docs/algorithm.md (1), (4), (5): warm-up, weight of this iterate, averaging weight."""
        beta1, beta2 = group["betas"]
        step = counters["step"].add_(tick)
        lr = warmed_up(group["lr"], step, group["warmup_steps"])
        lr_max = torch.maximum(counters["lr_max"], lr * tick)
        weight = step ** group["r"] * lr_max ** group["weight_lr_power"]
        weight_sum = counters["weight_sum"].add_(weight * tick)
        counters["lr_max"].copy_(lr_max)
        # lr = 0 so far: nothing has a weight yet, the average stays where it is.
        ckp1 = torch.where(weight_sum > 0, weight / weight_sum, 0.0)
        decay = group["weight_decay"] / (group["max_lr"] if group["decouple_lr"] else 1.0)
        return _Coefficients(
            lr=lr,
            average=beta1 * ckp1,
            direct=1.0 - beta1,
            keep=1.0 - ckp1,
            decay=decay * lr,
            carry2=beta2,
            fresh2=1.0 - beta2,
            bias_correction2=1.0 - beta2**step,
            eps=group["eps"],
            clip_blocks=group["clip"] == "block",
        )

    def told(self, counters: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The last step's learning rate, docs/algorithm.md (1), and averaging weight, (5)."""
        step = counters["step"]
        weight = step ** group["r"] * counters["lr_max"] ** group["weight_lr_power"]
        total = counters["weight_sum"]
        return {
            "lr": warmed_up(group["lr"], step, group["warmup_steps"]),
            "ckp1": torch.where(total > 0, weight / total, 0.0),
        }

    def part(self, c: _Coefficients, first: bool, last: bool, begun: Scalar) -> _Coefficients:
        """docs/release.md (15): weights decay with the first part, the last averages."""
        if not first:
            c = c._replace(carry2=1.0, decay=0.0)
        if not last:
            lr, decay = c.lr * begun, c.decay * begun
            c = c._replace(lr=lr, decay=decay, average=0.0, keep=1.0)
        return c

    def move(
        self,
        weight: Tensor,
        grad: Tensor,
        scale: Tensor,
        lines: tuple[Tensor, ...],
        decays: bool,
        c: _Coefficients,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """docs/algorithm.md (6) to (8)."""
        (gap,) = lines
        update = grad * (c.lr * scale)
        if decays:
            update = update + c.decay * weight
        gap = gap + update
        weight = weight - c.average * gap - c.direct * update
        return weight, (c.keep * gap,)

    def to_x(self, weight: Tensor, lines: tuple[Tensor, ...], group: Mapping[str, Any]) -> Tensor:
        """docs/algorithm.md (9): x = y + (1 - beta1) e."""
        beta1: float = group["betas"][0]
        return weight + (1.0 - beta1) * lines[0]

    def to_y(self, weight: Tensor, lines: tuple[Tensor, ...], group: Mapping[str, Any]) -> Tensor:
        """docs/algorithm.md (9), read backwards."""
        beta1: float = group["betas"][0]
        return weight - (1.0 - beta1) * lines[0]


RULE = ScheduleFree()
