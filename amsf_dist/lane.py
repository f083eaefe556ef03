"""Parameters that count alike: their counters, and the kernels that step them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amsf_dist.clock import Lately, advance
from amsf_dist.kernels import Holding, Kernel, Moves, kernels_for
from amsf_dist.kernels.choice import on_host
from amsf_dist.rules import Rule
from amsf_dist.rules.protocol import Coefficients
from amsf_dist.state import Counters

__all__ = ["Lane", "Advanced"]


class Advanced(NamedTuple):
    """What a lane's step multiplies by.

    Attributes:
        rule: its columns, see `Kernel.moves`.
        draws: [lane's parameters] fp64, keys of stochastic rounding.
    """

    rule: Coefficients
    draws: Tensor


@dataclass
class Lane:
    """Parameters of one group on one device: they share hyper-parameters and counters.

    Attributes:
        waits: for each of the holdings, which pieces move only when ranks have agreed.
        lately: what lanes of the group share of a step.
        waiting: kernels of those; each piece has one kernel.
        free: kernels of the others.
    """

    group: Mapping[str, Any]
    rule: Rule
    device: torch.device
    holdings: list[Holding]
    waits: InitVar[Sequence[Collection[int]]]
    counters: Counters
    lately: Lately
    waiting: list[Kernel] = field(init=False)
    free: list[Kernel] = field(init=False)

    def __post_init__(self, waits: Sequence[Collection[int]]) -> None:
        """Choose the kernels."""
        waiting, free = [], []
        for holding, numbers in zip(self.holdings, waits, strict=True):
            waiting += holding.only(numbers)
            free += holding.only(set(range(len(holding.layout.pieces))).difference(numbers))
        self.waiting, self.free = kernels_for(waiting), kernels_for(free)
        self._elsewhere = [h for h in self.holdings if h.layout.flat and not h.layout.numel]

    @property
    def kernels(self) -> list[Kernel]:
        """All of them."""
        return self.waiting + self.free

    def advance(self, finite: Tensor | None, part: int = 0, last: bool = True) -> Advanced | None:
        """Advance the counters.

        Args:
            finite: 0-dim bool on the lane's device, which all ranks that share the step have;
                where False no counter moves. None: blocks decide for themselves, counters move.
            part: how many parts of the step have been added before.
            last: whether this is the last one; counters advance with it.

        Returns:
            What the step multiplies by; None where it moves nothing.
        """
        stepping = [h for h in self.holdings if h.param.grad is not None]
        # only FSDP1 leaves out the gradients of what is not here: those count along
        absent = [h for h in self._elsewhere if h.param.grad is None]
        # not "if anything has a gradient": under FSDP1 ranks without a part of what was used differ
        counts = self.rule.ticks_without_gradient and self.group["train_mode"]
        elsewhere = self.group["train_mode"] and len(absent) == len(self.holdings)
        if not (stepping or counts or elsewhere):
            return None
        if finite is not None and on_host(self.device):  # then the verdict costs nothing
            if not finite:
                return None
            finite = None
        indices = [holding.index for holding in stepping + absent]
        columns = advance(
            self.rule, self.group, self.counters.values, indices, self.lately, finite, part, last
        )
        # every part rounds with numbers of its own
        return Advanced(columns, self.counters.values["step"] + part * _PARTS_APART)

    def moves(
        self, kernels: Sequence[Kernel], by: Advanced | None, finite: Tensor, everyone_knows: bool
    ) -> list[Moves]:
        """Advance the moments of every parameter that has a gradient.

        Args:
            kernels: of the lane.
            by: from `advance`.
            finite: 0-dim bool on the lane's device; where False nothing changes.
            everyone_knows: whether all ranks that share the step have this verdict; if not, every
                block decides for itself.

        Returns:
            What is to be written of those parameters.
        """
        if by is None:
            return []
        # Where the host can read the verdict for nothing, a finite step needs no masks.
        verdict = None if on_host(self.device) and finite else finite
        by_block = verdict is not None and not everyone_knows
        return [
            moves
            for kernel in kernels
            for moves in kernel.moves(by.rule, by.draws, verdict, by_block)
        ]


_PARTS_APART = 2.0**32
