"""Which kernel steps which tensors: said here, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.move import Move
from amsf_dist.kernels.reference import sum_of_squares
from amsf_dist.rules.protocol import Coefficients, Scalar

__all__ = [
    "AMSF_KERNEL",
    "Kernel",
    "Moves",
    "Reference",
    "by_parameter",
    "kernels_for",
    "on_host",
]

AMSF_KERNEL = "AMSF_KERNEL"
"""Environment variable: "auto" (the fastest that there is for a device), "reference" (torch
operations), "triton"."""


class Moves(Protocol):
    """What is to be written of some tensors."""

    def seek_peaks(self) -> None:
        """Find the largest magnitudes in groups that tiles share."""
        ...

    def write(self) -> None:
        """Move the weights and the lines."""
        ...


class Kernel(Protocol):
    """Steps some tensors of a lane; those without a gradient are passed over.

    Attributes:
        holdings: the tensors.
        finite: whether what this step has measured so far is finite, if the host knows; else None.
    """

    holdings: Sequence[Holding]
    finite: bool | None

    def measure(self, later: bool = False) -> None:
        """Add grad**2 of every block this rank sees to the block sums, which are zero.

        Args:
            later: blocks decide for themselves and nobody waits for their sums: they may be
                written with the weights.
        """
        ...

    def moves(
        self, c: Coefficients, draws: Tensor, finite: Tensor | None, by_block: bool
    ) -> Sequence[Moves]:
        """Advance the moments of blocks, as `Move` does.

        Args:
            c: the rule's scalars: columns as `Rule.advance` gives them, over the whole lane.
            draws: [lane's parameters] fp64, keys of stochastic rounding.
            finite: see `Move`.
            by_block: see `Move`.
        """
        ...


class Reference:
    """The torch kernels, tensor by tensor."""

    finite: bool | None = None

    def __init__(self, holdings: Sequence[Holding]) -> None:
        """Step these."""
        self.holdings = holdings

    def measure(self, later: bool = False) -> None:
        """See `Kernel`."""
        for holding in self.holdings:
            if holding.param.grad is not None:
                sum_of_squares(holding)

    def moves(
        self, c: Coefficients, draws: Tensor, finite: Tensor | None, by_block: bool
    ) -> Sequence[Moves]:
        """See `Kernel`."""
        rows, steps = by_parameter(c, draws)
        return [
            Move(holding, rows[holding.index], steps[holding.index], finite, by_block)
            for holding in self.holdings
            if holding.param.grad is not None
        ]


def by_parameter(c: Coefficients, draws: Tensor) -> tuple[list[Coefficients], Sequence[Scalar]]:
    """The rule's scalars and the keys of every parameter of a lane, by its index.

    Floats where the host can read them for nothing, else 0-dim tensors on the device.

    Args:
        c: columns, see `Kernel.moves`.
        draws: [lane's parameters].
    """
    columns = [_per_parameter(column, len(draws)) for column in c]
    rows = [type(c)(*row) for row in zip(*columns, strict=True)]
    return rows, _per_parameter(draws, len(draws))


def kernels_for(holdings: Sequence[Holding]) -> list[Kernel]:
    """Which kernel steps which of a lane's tensors.

    Args:
        holdings: of one group, on one device.

    Raises:
        ValueError: the environment variable AMSF_KERNEL names no kernel.
    """
    chosen = os.environ.get(AMSF_KERNEL, "auto")
    if chosen not in ("auto", "reference", "triton"):
        raise ValueError(f"{AMSF_KERNEL} must be 'auto', 'reference' or 'triton', got {chosen!r}")
    if not holdings:
        return []
    if chosen == "reference":
        return [Reference(holdings)]
    device = holdings[0].exp_avg_sq.device.type
    if chosen == "triton" or device == "cuda" and find_spec("triton") is not None:
        from amsf_dist.kernels.triton.stepper import split

        return split(holdings)
    if device == "cpu":
        from amsf_dist.kernels.native.stepper import split

        return split(holdings)
    return [Reference(holdings)]


def on_host(device: torch.device) -> bool:
    """Whether the host can read a tensor of this device without waiting for anything."""
    return device.type == "cpu"


def _per_parameter(column: Tensor | float, count: int) -> Sequence[Scalar]:
    if not isinstance(column, Tensor):
        return [column] * count
    return column.tolist() if on_host(column.device) else column.unbind()
