"""What a storage must do: say which tensors it keeps, and turn them into numbers and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Draw", "Groups", "Storage", "zeros"]

Draw = Callable[[int], Tensor]
"""Gives [span numel] int32 random bits for the numbers being stored, 16 or 17 each (noise.py)."""


class Groups(NamedTuple):
    """Where a span lies in the groups of a line, for storages whose numbers share a scale.

    Attributes:
        first: the group of its first number, counted in the scales' memory.
        phase: numbers of that group that lie before it.
        peaks: [2] fp32, the largest magnitudes in the first and in the last group on other spans
            and ranks, 0 where those are complete here; None: 0.
        moves: [span numel] bool in any shape, or 0-dim for all: False where a number is stored as
            it was read, which must leave it as it is. None: True everywhere.
    """

    first: int
    phase: int
    peaks: Tensor | None = None
    moves: Tensor | None = None


class Storage(Protocol):
    """Memory <-> numbers.

    `tensors` are this rank's memory in the order of `keys`, flat, in line order. The first is the
    line's own; of a weight it is the parameter itself, and only the others are state. Where the
    others are zero, the numbers are those of the first.

    Attributes:
        group: numbers that share an entry of the second key; 0 where every number has its own.
    """

    group: ClassVar[int]

    def keys(self, line: str) -> tuple[str, ...]:
        """Names of the entries of a line; the first is the line's own."""
        ...

    def allocate(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """State entries (key -> zeros) for one line.

        Args:
            line: its name.
            like: the parameter; entries take its shape, device and sharding (a DTensor's too).
                What groups share is not among them: how many there are here, the layout knows.
        """
        ...

    def beside(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """As `allocate`, without the line's own: what a weight needs."""
        ...

    def load(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        dtype: torch.dtype,
        groups: Groups | None = None,
    ) -> Tensor:
        """Numbers of a span of the line, [span numel] in `dtype`: fp32, or fp64 for more room."""
        ...

    def store(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        values: Tensor,
        draw: Draw | None = None,
        groups: Groups | None = None,
    ) -> None:
        """Write the numbers of a span, in place.

        Args:
            tensors: as above.
            span: of the line.
            values: [span numel] fp32 or fp64.
            draw: called at most once, and only by storages that round at random; without it they
                round to nearest.
            groups: where the span lies in them, for storages with groups.
        """
        ...


def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An entry laid out as the parameter."""
    return torch.zeros_like(like, dtype=dtype, requires_grad=False)
