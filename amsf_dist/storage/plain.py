"""Numbers kept as they are, rounded to nearest in the given dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from amsf_dist.storage.protocol import Draw, Groups, zeros

__all__ = ["Plain"]


@dataclass(frozen=True)
class Plain:
    """One tensor of one floating dtype: fp32, bf16, fp16 or fp64.

    Promise: a number reads back as the nearest of the dtype, the even one of two equally near.
    """

    group: ClassVar[int] = 0
    dtype: torch.dtype

    def keys(self, line: str) -> tuple[str, ...]:
        """One entry."""
        return (line,)

    def allocate(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """One tensor of zeros, laid out as `like`."""
        return {line: zeros(like, self.dtype)}

    def beside(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        dtype: torch.dtype,
        groups: Groups | None = None,
    ) -> Tensor:
        """The span in `dtype`; the memory itself, not a copy, where it is of that dtype."""
        return tensors[0][span].to(dtype)

    def store(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        values: Tensor,
        draw: Draw | None = None,
        groups: Groups | None = None,
    ) -> None:
        """Round to nearest and write."""
        tensors[0][span].copy_(values)
