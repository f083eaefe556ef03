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
def _rotated(word):
    """By 8 bits to the left."""
    return (word << 8) | ((word >> 56) & 0xFF)


@triton.jit
def key_of(family, step):
    """The key of one step: int64 scalars, `family` from `noise.family`."""
    return _mix64(step * _GAMMA + family + _GAMMA) + _GAMMA


@triton.jit
def random_bits(key, place, offsets, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """[groups, 64] int32, random bits for the numbers at place + offsets of the line.

    Args:
        key: of the step, int64.
        place: of the first, int64; where ALIGNED a multiple of 8.
        offsets: [groups, 64] int32, 0, 1, 2, ...
        COUNT: of bits, 16 or 17.
        ALIGNED: whether eight numbers always share a word, which is then computed once.
    """
    MASK: tl.constexpr = 0x1FFFF if COUNT == 17 else 0xFFFF
    SHARED: tl.constexpr = 1 if COUNT == 17 else 0
    if ALIGNED:
        GROUPS: tl.constexpr = offsets.shape[0]
        words = tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None, :]
        word = _mix64(words.to(tl.int64) * _GAMMA + ((place >> 3) * _GAMMA + key))
        word = tl.join(word, _rotated(word))
        pair = tl.join(word.to(tl.int32), (word >> 32).to(tl.int32))
        drawn = tl.join(pair & MASK, (pair >> (16 - SHARED)) & MASK)
        return tl.reshape(drawn, [GROUPS, 64])
    else:
        inside = offsets + (place & 7).to(tl.int32)
        word = _mix64((inside >> 3).to(tl.int64) * _GAMMA + ((place >> 3) * _GAMMA + key))
        word = tl.where((inside & 4) != 0, _rotated(word), word)
        first = (inside & 3) * 16 - (inside & 1) * SHARED
        return (word >> first.to(tl.int64)).to(tl.int32) & MASK
