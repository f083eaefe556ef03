"""Numbers in 8 bits: the numbers of a group share a scale, and are rounded at random ("int8").

    value = c * (|c| + 32) * scale,     c = -127 .. 127

A compander between equal steps (c * scale) and the square (c * |c| * scale): steps grow
from 33 to 285 scales. Chosen by the noise of rounding (its rms over that of the numbers): lowest of
the three on gaps, and nowhere far from the lowest:

    groups of 64                                   equal steps    square    this
    gaps of a small decoder after 300 steps          0.89 %       0.94 %    0.86 %
    normal                                           0.85         0.92      0.84
    Laplace                                          1.12         0.99      0.92
    Student t, 2 degrees of freedom                  2.21         0.89      0.92
    normal, one number in 64 times 30: the others    9.60         2.81      3.17

Every number decoded is exact in fp32 (15 bits times 8), so rounding, the places between two codes
and the mean over all random bits are too, and every device has the same.

Sources: group-wise absmax codes with a compander from 8-bit optimizers (arXiv 2110.02861) and
FlashOptim (arXiv 2602.23349); this compander and rounding at random in the value domain are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amsf_dist.roots import root

__all__ = [
    "BEND",
    "GROUP",
    "HIGHEST",
    "NOT_A_NUMBER",
    "SCALE_DTYPE",
    "SMALLEST_SCALE",
    "decode",
    "encode",
    "highest",
]

GROUP = 64
"""Numbers of a parameter's line that share a scale; the last group may have fewer."""

SCALE_DTYPE = torch.bfloat16
"""With the exponents of fp32: a gap may be 1e-9, and fp16 has nothing 20,000 times below it."""
NOT_A_NUMBER = -128
"""The code of what was not finite."""

BEND = 32
TOP = 127
HIGHEST = TOP * (TOP + BEND)
SMALLEST_SCALE = 2.0**-100  # the 2**17th part of a step is then still a normal number
_HALF_CHANCE = 2.0**-17  # 16 random bits are the middles of so many equal parts


def encode(
    values: Tensor, bits: Tensor | None = None, peaks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of groups.

    A number between the values of codes k and k + 1 lies in a step of (2 k + 33) scales, which is
    2 sqrt(|v| scale + 256 scale**2) + scale at most; the scale is absmax / 20193, rounded up.

    - What is decoded is one end of the step: less than a step away, without bits half a step.
    - Over all bits its mean is v, to 2**-17 of the step.
    - Zeros stay zeros, signs stay. With equal bits and scales order is kept, and what was decoded
      is encoded without change.
    - No code overflows: the scale is up to 2**-7 of itself larger than it must be, and never less
      than 2**-100, so that numbers below 1e-29 are few steps or parts of one.
    - Infinities and NaN decode to NaN, and leave their neighbours alone. |v| < 2**127.

    Args:
        values: [groups, size] fp32.
        bits: [groups, size] int32, 0 to 65,535; None: to nearest.
        peaks: [groups] fp32, the largest magnitudes of the groups' numbers that are not among these
            values, or 0. None: all are here.

    Returns:
        [groups, size] int8 codes; [groups] bf16 scales.
    """
    magnitude = values.abs().nan_to_num_(0.0, 0.0, 0.0)
    absmax = magnitude.amax(1)
    scales = _scales(absmax if peaks is None else torch.maximum(absmax, peaks))
    scale = scales.to(torch.float32).unsqueeze(1)

    # The largest k with k (k + 32) <= |v| / scale; where v is a last place away from a code's value
    # maybe the next one or the one before it, from which rounding goes to that code as well.
    below = root((magnitude * (1.0 / scale)).add_(BEND**2 // 4))
    below = below.sub_(BEND // 2).floor_()
    beyond = magnitude - below * (below + BEND) * scale
    step = (2.0 * below + (BEND + 1)) * scale
    if bits is None:
        up = beyond > 0.5 * step
    else:
        chance = (2 * bits + 1).to(torch.float32)
        up = beyond > chance * (_HALF_CHANCE * step)
    codes = (below + up).copysign_(values)
    codes += values - values  # NaN where the number was not finite, else nothing
    return codes.nan_to_num_(NOT_A_NUMBER).to(torch.int8), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers, exactly.

    Args:
        codes: [groups, size] int8.
        scales: [groups] bf16.

    Returns:
        [groups, size] fp32.
    """
    c = codes.to(torch.float32)
    values = c * (c.abs() + BEND) * scales.to(torch.float32).unsqueeze(1)
    return values.masked_fill_(codes == NOT_A_NUMBER, float("nan"))


def highest(scales: Tensor) -> Tensor:
    """[groups] fp32, the largest magnitudes that groups of these scales (bf16) can have."""
    return scales.to(torch.float32) * HIGHEST


def _scales(absmax: Tensor) -> Tensor:
    """The smallest bf16 that is not less than absmax / 20193."""
    # tensor by tensor: devices divide by a Python number through its reciprocal, which is rounded,
    # and a scale that is right already would be rounded up again. The quotient may be rounded:
    # 20193 times a bf16 is an fp32, and the next one divided is more than half a place above it.
    least = (absmax / torch.full_like(absmax, HIGHEST)).clamp_min_(SMALLEST_SCALE)
    return ((least.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(SCALE_DTYPE)
