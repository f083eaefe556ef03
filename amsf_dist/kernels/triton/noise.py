"""Random bits of storage/noise.py in Triton: the same integers for the same (seed, step, place)."""

from __future__ import annotations

import triton
import triton.language as tl

from amsf_dist.storage import noise

__all__ = ["key_of", "random_bits"]

_GAMMA = tl.constexpr(noise.GAMMA)
_MIX64_A, _MIX64_B = map(tl.constexpr, noise.MIX64)


@triton.jit
def _mix64(z):
    # int64 wraps when it overflows, and `>>` repeats the sign: hence a mask after every shift
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX64_A
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX64_B
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@triton.jit
def key_of(family, step):
    """The key of one step: int64 scalars, `family` from `noise.family`."""
    return _mix64(step * _GAMMA + family + _GAMMA) + _GAMMA


@triton.jit
def random_bits(key, place, offsets, ALIGNED: tl.constexpr):
    """[groups, 64] int32, 16 random bits for the numbers at place + offsets of the line.

    Args:
        key: of the step, int64.
        place: of the first, int64; where ALIGNED a multiple of 4.
        offsets: [groups, 64] int32, 0, 1, 2, ...
        ALIGNED: whether four numbers always share a word, which is then computed once.
    """
    if ALIGNED:
        GROUPS: tl.constexpr = offsets.shape[0]
        words = tl.arange(0, GROUPS)[:, None] * 16 + tl.arange(0, 16)[None, :]
        word = _mix64(words.to(tl.int64) * _GAMMA + ((place >> 2) * _GAMMA + key))
        low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
        even = tl.join(low & 0xFFFF, high & 0xFFFF)
        odd = tl.join((low >> 16) & 0xFFFF, (high >> 16) & 0xFFFF)
        return tl.reshape(tl.join(even, odd), [GROUPS, 64])
    else:
        inside = offsets + (place & 3).to(tl.int32)
        word = _mix64((inside >> 2).to(tl.int64) * _GAMMA + ((place >> 2) * _GAMMA + key))
        return (word >> ((inside & 3) * 16).to(tl.int64)).to(tl.int32) & 0xFFFF
