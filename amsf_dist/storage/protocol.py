"""What a storage must do: say which tensors it keeps, and turn them into numbers and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Draw", "Storage", "zeros"]

Draw = Callable[[], Tensor]
"""Gives [span numel] int32 random bits for the numbers being stored (noise.py)."""


class Storage(Protocol):
    """Memory <-> numbers.

    `tensors` are this rank's memory in the order of `keys`, flat, in line order. The first is the
    line's own; of a weight it is the parameter itself, and only the others are state. Where the
    others are zero, the numbers are those of the first.
    """

    def keys(self, line: str) -> tuple[str, ...]:
        """Names of the entries of a line; the first is the line's own."""
        ...

    def allocate(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """State entries (key -> zeros) for one line.

        Args:
            line: its name.
            like: the parameter; entries take its shape, device and sharding (a DTensor's too).
        """
        ...

    def beside(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """As `allocate`, without the line's own: what a weight needs."""
        ...

    def load(self, tensors: tuple[Tensor, ...], span: slice, dtype: torch.dtype) -> Tensor:
        """Numbers of a span of the line, [span numel] in `dtype`: fp32, or fp64 for more room."""
        ...

    def store(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        values: Tensor,
        draw: Draw | None = None,
    ) -> None:
        """Write the numbers of a span, in place.

        Args:
            tensors: as above.
            span: of the line.
            values: [span numel] fp32 or fp64.
            draw: called at most once, and only by storages that round at random; without it they
                round to nearest.
        """
        ...


def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An entry laid out as the parameter."""
    return torch.zeros_like(like, dtype=dtype, requires_grad=False)
