"""Numbers in 8 bits: the numbers of a group share a scale, and are rounded at random ("int8").

With s the scale of its group, v is stored as the place of s + |v| among the fp32 numbers after s,
and a sign:

    code = (pattern(s + |v|) - pattern(s)) / 2**17,     |v| = number(pattern(s) + code 2**17) - s

Patterns of positive floats count them in their order, evenly between powers of two: this is a
compander of equal steps that double twice on the way to a group's largest number, not quite 3 s.
What makes it quick is that rounding at random is what it is for bf16 (stochastic.py): random bits
are added to the 17 that will be cut off. No root, no comparison, no quotient per number. Its price
is the noise of rounding (its rms over that of the numbers), beside equal steps and the smooth
compander c (|c| + 32), which takes a root:

    groups of 64                                   equal steps    smooth     this
    gaps of a small decoder after 300 steps          0.87 %       0.83 %    0.86 %
    normal                                           0.84         0.82      0.85
    Laplace                                          1.09         0.88      0.94
    Student t, 2 degrees of freedom                  1.56         0.93      1.12
    normal, one number in 64 times 30: the others    9.83         3.22      5.17

A scale has 6 bits behind its leading one, so that steps end where powers of two do: a step is as
long everywhere in it, and the mean over all random bits is exact. So is every number decoded, and
every device has the same.

Sources: group-wise absmax codes with a compander from 8-bit optimizers (arXiv 2110.02861) and
FlashOptim (arXiv 2602.23349); floating point as the compander, offset by the scale, is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "CUT_BITS",
    "GROUP",
    "LIMIT",
    "SCALE_DTYPE",
    "SMALLEST_SCALE",
    "THIRD",
    "decode",
    "encode",
    "highest",
]

GROUP = 64
"""Numbers of a parameter's line that share a scale; the last group may have fewer."""

SCALE_DTYPE = torch.bfloat16
"""With the exponents of fp32: a gap may be 1e-9, and fp16 has nothing so far below it."""

CUT_BITS = 17
"""Of a pattern: 6 bits of the mantissa are kept."""

SMALLEST_SCALE = 0x0D800000
"""A pattern: 2**-100, whose 2**7 parts are still normal numbers."""

LIMIT = 2.0**127
"""Numbers from here on have no scale: their sum with it could be infinite."""

THIRD = 0.3333333432674408
"""As fp32 has it: devices do not agree on the rounding of a quotient by a Python number."""

_SIGN, _TOP = -(2**31), 127


def encode(
    values: Tensor, bits: Tensor | None = None, peaks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of groups.

    A number v lies in a step of (s + |v|) / 64 at most, s being the group's scale: the smallest of
    7 bits of which code 127 reaches the largest number, not quite 3 s.

    - What is decoded is one end of the step: less than a step away, without bits half a step.
    - Over all bits its mean is v, to 2**-17 of the step: s + |v| is rounded to an fp32 number.
    - Zeros stay zeros, signs stay, and there is one code for zero. With equal bits and scales order
      is kept, and what was decoded is encoded without change.
    - No code overflows. No scale is less than 2**-100, so that numbers below 1e-32 are few steps or
      parts of one.
    - A group with a NaN, or a number of 2**127 or more, decodes to NaN as a whole.

    Args:
        values: [groups, size] fp32.
        bits: [groups, size] int32, 0 to 131,071; None: to nearest.
        peaks: [groups] fp32, the largest magnitudes of the groups' numbers that are not among these
            values, or 0. None: all are here.

    Returns:
        [groups, size] int8 codes, the sign in the highest bit; [groups] bf16 scales.
    """
    absmax = values.abs().amax(1)
    scales = _scales(absmax if peaks is None else torch.maximum(absmax, peaks))
    scale = scales.to(torch.float32).unsqueeze(1)
    pattern = (values + scale.copysign(values)).view(torch.int32)
    pattern -= scale.view(torch.int32)
    pattern += 1 << CUT_BITS - 1 if bits is None else bits
    codes = pattern >> CUT_BITS & _TOP
    nothing = (codes == 0) | scale.isnan()
    return (codes | pattern >> 24 & -128).masked_fill_(nothing, 0).to(torch.int8), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers, exactly.

    Args:
        codes: [groups, size] int8.
        scales: [groups] bf16.

    Returns:
        [groups, size] fp32.
    """
    code = codes.to(torch.int32)
    scale = scales.to(torch.float32).unsqueeze(1).view(torch.int32)
    sign = code & _SIGN
    raised = ((code & _TOP) << CUT_BITS).add_(scale).bitwise_or_(sign)
    return raised.view(torch.float32) - (sign | scale).view(torch.float32)


def highest(scales: Tensor) -> Tensor:
    """[groups] fp32, the largest magnitudes that groups of these scales (bf16) can have."""
    return decode(torch.full_like(scales, _TOP, dtype=torch.int8).unsqueeze(1), scales).squeeze(1)


def _scales(absmax: Tensor) -> Tensor:
    """The smallest of 7 bits of which code 127 reaches absmax; NaN where none does."""
    # In units of a scale's last bit code 127 stands for 3 n - 4 at least, so n is one or two more
    # than a third of absmax rounded up, and where that is rounded is of no matter.
    pattern = ((absmax * THIRD).view(torch.int32) + ((2 << CUT_BITS) - 1)) >> CUT_BITS << CUT_BITS
    reached = (pattern + (_TOP << CUT_BITS)).view(torch.float32) - pattern.view(torch.float32)
    pattern += (reached < absmax).to(torch.int32) << CUT_BITS
    scales = (pattern.clamp_min_(SMALLEST_SCALE) >> 16).to(torch.int16).view(SCALE_DTYPE)
    return scales.masked_fill(~(absmax < LIMIT), torch.nan)
