"""Low-precision weights with a compensation of the same dtype beside them: "kahan".

weight = nearest(v), compensation = nearest(v - weight), read back as weight + compensation. A step
reads the sum, applies the whole update (weight decay included) in fp32 and splits the result anew,
so updates far smaller than the weight's last place add up until they move it.

Source: Kahan summation as in optimi (Benjamin Warner), which keeps the same two tensors but adds
the update to the compensation in the low precision, and applies weight decay outside of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from amsf_dist.storage.protocol import Draw, Groups, zeros
from amsf_dist.storage.wide import LOW_BITS, from_wide

__all__ = ["Kahan"]


@dataclass(frozen=True)
class Kahan:
    """A bf16 or fp16 tensor, and what it lacks in another.

    Promise, for fp32 values v that do not overflow the dtype:

    - The weight is v rounded to nearest, ties to even, as every cast has it.
    - bf16: |read - v| <= 2**-17 |v| for |v| >= 2**-117, and <= 2**-134 below.
    - fp16: |read - v| <= 2**-23 |v| for |v| >= 1/4, and <= 2**-25 below, where compensations
      underflow: a weight of 2**-7 has 6 bits of them, one below 2**-13 none. "bf16+8" and
      "bf16+16" do not end there.
    - A number of the dtype reads back bit for bit, infinities and -0 too; NaN as NaN; what
      overflows the dtype as infinity. Order is kept.
    """

    group: ClassVar[int] = 0
    dtype: torch.dtype

    def keys(self, line: str) -> tuple[str, ...]:
        """Two entries."""
        return line, f"{line}_compensation"

    def allocate(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """Both, zero."""
        return {line: zeros(like, self.dtype), **self.beside(line, like)}

    def beside(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """The compensation."""
        return {f"{line}_compensation": zeros(like, self.dtype)}

    def load(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        dtype: torch.dtype,
        groups: Groups | None = None,
    ) -> Tensor:
        """The sum, in `dtype`."""
        weight, compensation = tensors
        return weight[span].to(dtype) + compensation[span].to(dtype)

    def store(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        values: Tensor,
        draw: Draw | None = None,
        groups: Groups | None = None,
    ) -> None:
        """Round, and keep what was lost."""
        weight, compensation = tensors
        rounded = values.to(self.dtype)
        # read back through integers: compilers take `.to(bfloat16).to(float32)` for nothing
        pattern = rounded.view(torch.int16).to(torch.int32) << LOW_BITS[self.dtype]
        excess = from_wide(pattern, self.dtype).to(values.dtype) - values
        # infinity - infinity: nothing is missing. Negated last, so that -0 + -0 stays -0.
        lacking = excess.nan_to_num_(0.0, 0.0, 0.0).neg_()
        weight[span].copy_(rounded)
        compensation[span].copy_(lacking)
