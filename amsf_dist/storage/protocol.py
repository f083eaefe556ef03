"""What a storage must do: say which tensors it keeps, and turn them into numbers and back."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Storage"]


class Storage(Protocol):
    """Memory <-> numbers.

    `tensors` are this rank's memory in the order of `keys`, flat, in line order.
    """

    def keys(self, line: str) -> tuple[str, ...]:
        """Names of the state entries of a line; the first is the line's own."""
        ...

    def allocate(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """State entries (key -> zeros) for one line.

        Args:
            line: its name.
            like: the parameter; entries take its shape, device and sharding (a DTensor's too).
        """
        ...

    def load(self, tensors: tuple[Tensor, ...], span: slice, dtype: torch.dtype) -> Tensor:
        """Numbers of a span of the line, [span numel] in `dtype`."""
        ...

    def store(self, tensors: tuple[Tensor, ...], span: slice, values: Tensor) -> None:
        """Write the numbers of a span, in place."""
        ...
