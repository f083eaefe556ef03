"""Low-precision weights with integer error bits beside them: "bf16+8" and "bf16+16".

The pattern of the number (wide.py), shortened to the bits kept, is split in two integers:

    pattern = weight * 2**kept + error,     -2**(kept - 1) <= error < 2**(kept - 1)

so the weight is the pattern's nearest bf16, and the error counts, in 2**kept-ths of a bf16 step,
how far the number's magnitude lies from the weight's. It may carry into the exponent: integers do.

Idea: FlashOptim (arXiv 2602.23349), whose error is a rounded float quotient; here it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from amsf_dist.storage.protocol import Draw, Groups, zeros
from amsf_dist.storage.wide import LOW_BITS, QUIET_NAN, from_wide, to_wide

__all__ = ["Split"]


@dataclass(frozen=True)
class Split:
    """A bf16 or fp16 tensor, and an integer tensor with the bits below it.

    Promise, for fp32 values v:

    - bf16, 16 bits: v reads back bit for bit, signed zeros, subnormals and infinities too.
    - bf16, 8 bits: v reads back as the nearest 24-bit float (1-8-15), ties to even:
      |read - v| <= 2**-16 |v| for normal v. Order is kept, and what was read is stored unchanged.
    - fp16, 16 bits (13 are used): v reads back bit for bit for 2**-14 <= |v| < 2**16, the nearest
      multiple of 2**-37 below, infinity above.
    - fp16, 8 bits: v reads back as the nearest 1-5-18 float: |read - v| <= 2**-19 |v| for
      2**-14 <= |v| < 2**16, and <= 2**-33 + 2**-38 below. Otherwise as 8 bits above.
    - The weight tensor, which the model computes with, is the number of its dtype nearest to what
      reads back; of two equally near the larger in magnitude. (The even one, as casts have it,
      would leave 2**16 + 1 numbers to some weights, one more than 16 bits tell apart.) It is
      infinite where such a cast of what reads back is.
    - NaN reads back as NaN, payload and sign not kept.
    """

    group: ClassVar[int] = 0
    dtype: torch.dtype
    bits: int

    @property
    def _kept(self) -> int:
        return min(self.bits, LOW_BITS[self.dtype])

    @property
    def _error_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits == 8 else torch.int16

    def keys(self, line: str) -> tuple[str, ...]:
        """Two entries."""
        return line, f"{line}_error"

    def allocate(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """Both, zero."""
        return {line: zeros(like, self.dtype), **self.beside(line, like)}

    def beside(self, line: str, like: Tensor) -> dict[str, Tensor]:
        """The error bits."""
        return {f"{line}_error": zeros(like, self._error_dtype)}

    def load(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        dtype: torch.dtype,
        groups: Groups | None = None,
    ) -> Tensor:
        """Put the pattern together."""
        weight, error = tensors
        wide = weight[span].view(torch.int16).to(torch.int32)
        wide <<= self._kept
        wide += error[span]
        wide <<= LOW_BITS[self.dtype] - self._kept
        return from_wide(wide, self.dtype).to(dtype)

    def store(
        self,
        tensors: tuple[Tensor, ...],
        span: slice,
        values: Tensor,
        draw: Draw | None = None,
        groups: Groups | None = None,
    ) -> None:
        """Shorten the pattern to nearest and take it apart."""
        weight, error = tensors
        values = values.to(torch.float32)
        wide = to_wide(values, self.dtype).masked_fill(values.isnan(), QUIET_NAN[self.dtype])
        short = _rounded(wide, LOW_BITS[self.dtype] - self._kept)
        # the low bits as a signed number: what remains is the nearest multiple of 2**kept
        low = short << 32 - self._kept
        low >>= 32 - self._kept
        error[span].copy_(low)
        weight[span].view(torch.int16).copy_((short - low) >> self._kept)


def _rounded(wide: Tensor, dropped: int) -> Tensor:
    """The pattern without its last bits, to nearest, ties to even."""
    if not dropped:
        return wide
    odd = wide >> dropped
    odd &= 1
    return (wide + odd + ((1 << dropped - 1) - 1)) >> dropped
