"""Numbers of a low precision, rounded up or down at random so that the expectation is exact.

Random bits are added to the part of the pattern (wide.py) that will be cut off; a carry rounds up,
with the probability of the part cut off. Updates far smaller than the last place thus arrive on
average, at no byte. Source: adamw_bfloat16, FlashOptim (arXiv 2602.23349).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amsf_dist.storage.plain import Plain
from amsf_dist.storage.protocol import Draw, Groups
from amsf_dist.storage.wide import LOW_BITS, to_wide

__all__ = ["Stochastic", "round_at_random"]


@dataclass(frozen=True)
class Stochastic(Plain):
    """One bf16 or fp16 tensor, of weights or of a line; without a draw it is `Plain`.

    Promise: see `round_at_random`.
    """

    def store(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        values: Tensor,
        draw: Draw | None = None,
        groups: Groups | None = None,
    ) -> None:
        """Round at random, or to nearest without a draw, and write."""
        if draw is not None:
            values = round_at_random(values.to(torch.float32), self.dtype, draw(16))
        tensors[0][span].copy_(values)


def round_at_random(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """One of the two neighbours in the dtype.

    - Over all random bits the mean is the value: exactly for bf16, subnormals too, and for fp16
      from 2**-14 on; to 2**-38 for fp16 below.
    - A number of the dtype stays as it is. With equal bits order is kept.
    - Beyond the largest finite number: to nearest, hence infinite where a cast is. Infinities and
      NaN stay what they are.

    Args:
        values: [...] fp32.
        dtype: bf16 or fp16.
        bits: [...] int32; the lowest 16 (fp16: 13) count.

    Returns:
        [...] in `dtype`.
    """
    low_bits = LOW_BITS[dtype]
    wide = to_wide(values, dtype) + (bits & (1 << low_bits) - 1)
    rounded = (wide >> low_bits).to(torch.int16).view(dtype)
    inside = values.abs() <= torch.finfo(dtype).max
    return torch.where(inside, rounded, values.to(dtype))
