"""fp32 numbers as integers whose top 16 bits are a bf16 or an fp16: the patterns that are split.

    bf16   s eeeeeeee mmmmmmm | mmmmmmmmmmmmmmmm      all 32 bits of fp32, 16 below the bf16
    fp16   s eeeee mmmmmmmmmm | mmmmmmmmmmmmm         1-5-23: fp32's mantissa, fp16's exponent, 13

Below the sign the order of patterns is that of magnitudes, across exponents and into infinity, so
cutting, rounding and adding noise are integer operations on the whole pattern. Nothing here reads
`x - x.bfloat16().float()`, which compilers simplify to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "INFINITY",
    "LOW_BITS",
    "QUIET_NAN",
    "REBIAS",
    "SIGN",
    "SMALLEST_NORMAL",
    "UNIT",
    "from_wide",
    "to_wide",
]

LOW_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""How many bits of the pattern lie below those of the dtype."""

QUIET_NAN = {torch.bfloat16: 0x7FC0 << 16, torch.float16: 0x7E00 << 13}
"""The pattern of NaN that is still NaN when the low bits are cut off, or rounded."""

REBIAS = (127 - 15) << 23  # between the exponents of fp32 and of fp16
SMALLEST_NORMAL = 1 << 23  # 2**-14, as 1-5-23
INFINITY = 31 << 23
SIGN = 1 << 28
UNIT = 2.0**-37  # of 1-5-23 numbers below 2**-14


def to_wide(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as patterns.

    bf16: exact. fp16: exact for 2**-14 <= |v| < 2**16, where nothing is lost; below rounded to
    nearest in units of 2**-37 (a 2**13th of fp16's smallest); from 2**16 on infinity. What becomes
    of NaN is not said: callers put `QUIET_NAN` there.

    Args:
        values: [...] fp32.
        dtype: bf16 or fp16.

    Returns:
        [...] int32.
    """
    bits = values.view(torch.int32)
    if dtype == torch.float16:
        magnitude = bits & 0x7FFFFFFF
        fixed = (values.abs() * (1.0 / UNIT)).round_().to(torch.int32)
        normal = (magnitude - REBIAS).clamp_(max=INFINITY)
        magnitude = torch.where(normal < SMALLEST_NORMAL, fixed, normal)
        bits = magnitude | (bits >> 3 & SIGN)
    return bits


def from_wide(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Patterns as numbers, exactly.

    Args:
        wide: [...] int32; of an fp16 pattern the bits above the sign are ignored.
        dtype: bf16 or fp16.

    Returns:
        [...] fp32.
    """
    if dtype == torch.bfloat16:
        return wide.view(torch.float32)
    magnitude = wide & (SIGN - 1)
    fixed = (magnitude.to(torch.float32) * UNIT).view(torch.int32)
    normal = magnitude + REBIAS
    normal = torch.where(magnitude < INFINITY, normal, normal + REBIAS)  # infinity to infinity
    bits = torch.where(magnitude < SMALLEST_NORMAL, fixed, normal)
    return (bits | (wide & SIGN) << 3).view(torch.float32)
