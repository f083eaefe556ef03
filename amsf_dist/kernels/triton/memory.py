"""The storages for one tile in Triton: memory to fp32 and back (amsf_dist/storage/).

A tile is [groups, 64] numbers of one line. 16-bit numbers are read and written as their patterns:
Triton's interpreter rounds casts to bf16 towards zero, and compilers may drop a cast and back.
`FORMAT` is "fp32", "bf16" or "fp16".
"""

from __future__ import annotations

import triton
import triton.language as tl

from amsf_dist.kernels.triton.arithmetic import is_finite
from amsf_dist.kernels.triton.noise import random_bits
from amsf_dist.storage import grouped, wide

__all__ = ["load_line", "load_number", "load_weight", "store_line", "store_weight"]

_REBIAS = tl.constexpr(wide.REBIAS)
_SMALLEST_NORMAL = tl.constexpr(wide.SMALLEST_NORMAL)
_INFINITY = tl.constexpr(wide.INFINITY)
_SIGN = tl.constexpr(wide.SIGN)
_UNIT = tl.constexpr(wide.UNIT)
_BEND = tl.constexpr(float(grouped.BEND))
_HIGHEST = tl.constexpr(float(grouped.HIGHEST))
_SMALLEST_SCALE = tl.constexpr(grouped.SMALLEST_SCALE)
_NOT_A_NUMBER = tl.constexpr(grouped.NOT_A_NUMBER)


@triton.jit
def _load(base, at, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Numbers at `base` (int64 address) + `at`."""
    pointer = base.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + at, mask=mask, other=0)


@triton.jit
def _store(base, at, mask, values, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = base.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + at, values.to(TYPE), mask=mask)


@triton.jit
def _from_16(pattern, FORMAT: tl.constexpr):
    """int16 patterns as fp32."""
    if FORMAT == "bf16":
        return (pattern.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return pattern.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _nearest_16(values, FORMAT: tl.constexpr):
    """int16 patterns of fp32 numbers rounded to nearest, ties to even."""
    if FORMAT == "bf16":
        bits = values.to(tl.int32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return tl.where(values == values, rounded, 0x7FC0).to(tl.int16)
    else:
        return values.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def _to_wide(values, FORMAT: tl.constexpr):
    """Source text: wide.to_wide."""
    bits = values.to(tl.int32, bitcast=True)
    if FORMAT == "fp16":
        # adding 2**23 rounds to a whole number, ties to even; larger ones are normal, not used here
        fixed = tl.minimum(tl.abs(values) * (1.0 / _UNIT), 8388608.0)
        fixed = ((fixed + 8388608.0) - 8388608.0).to(tl.int32)
        magnitude = bits & 0x7FFFFFFF
        normal = tl.minimum(magnitude - _REBIAS, _INFINITY)
        magnitude = tl.where(normal < _SMALLEST_NORMAL, fixed, normal)
        bits = magnitude | ((bits >> 3) & _SIGN)
    return bits


@triton.jit
def _from_wide(pattern, FORMAT: tl.constexpr):
    """Source text: wide.from_wide."""
    if FORMAT == "bf16":
        return pattern.to(tl.float32, bitcast=True)
    else:
        magnitude = pattern & (_SIGN - 1)
        fixed = (magnitude.to(tl.float32) * _UNIT).to(tl.int32, bitcast=True)
        normal = magnitude + _REBIAS
        normal = tl.where(magnitude < _INFINITY, normal, normal + _REBIAS)
        bits = tl.where(magnitude < _SMALLEST_NORMAL, fixed, normal)
        return (bits | ((pattern & _SIGN) << 3)).to(tl.float32, bitcast=True)


@triton.jit
def load_number(base, at, mask, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Numbers of a floating dtype: gradients, plain weights and lines."""
    if FORMAT == "fp32":
        return _load(base, at, mask, tl.float32, ALIGNED)
    else:
        return _from_16(_load(base, at, mask, tl.int16, ALIGNED), FORMAT)


@triton.jit
def _store_nearest(base, at, mask, values, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    if FORMAT == "fp32":
        _store(base, at, mask, values, tl.float32, ALIGNED)
    else:
        _store(base, at, mask, _nearest_16(values, FORMAT), tl.int16, ALIGNED)


@triton.jit
def _store_at_random(base, at, mask, values, bits, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Source text: stochastic.round_at_random."""
    LOW: tl.constexpr = 16 if FORMAT == "bf16" else 13
    LARGEST: tl.constexpr = 3.3895313892515355e38 if FORMAT == "bf16" else 65504.0
    pattern = _to_wide(values, FORMAT) + (bits & ((1 << LOW) - 1))
    rounded = (pattern >> LOW).to(tl.int16)
    inside = tl.abs(values) <= LARGEST
    rounded = tl.where(inside, rounded, _nearest_16(values, FORMAT))
    _store(base, at, mask, rounded, tl.int16, ALIGNED)


@triton.jit
def load_weight(
    base, beside, at, mask, STORAGE: tl.constexpr, FORMAT: tl.constexpr, ALIGNED: tl.constexpr
):
    """fp32 weights of a storage: "plain", "stochastic", "split8", "split16" or "kahan"."""
    if STORAGE == "split8" or STORAGE == "split16":
        # Source text: Split.load
        LOW: tl.constexpr = 16 if FORMAT == "bf16" else 13
        KEPT: tl.constexpr = 8 if STORAGE == "split8" else LOW
        TYPE: tl.constexpr = tl.int8 if STORAGE == "split8" else tl.int16
        pattern = _load(base, at, mask, tl.int16, ALIGNED).to(tl.int32) << KEPT
        pattern += _load(beside, at, mask, TYPE, ALIGNED).to(tl.int32)
        return _from_wide(pattern << (LOW - KEPT), FORMAT)
    elif STORAGE == "kahan":
        weight = load_number(base, at, mask, FORMAT, ALIGNED)
        return weight + load_number(beside, at, mask, FORMAT, ALIGNED)
    else:
        return load_number(base, at, mask, FORMAT, ALIGNED)


@triton.jit
def store_weight(
    base, beside, at, mask, values, key, place, offsets,
    STORAGE: tl.constexpr, FORMAT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write fp32 weights; `key`, `place` and `offsets`: see `random_bits`."""
    if STORAGE == "split8" or STORAGE == "split16":
        # Source text: Split.store
        LOW: tl.constexpr = 16 if FORMAT == "bf16" else 13
        KEPT: tl.constexpr = 8 if STORAGE == "split8" else LOW
        DROPPED: tl.constexpr = LOW - KEPT
        QUIET: tl.constexpr = 0x7FC00000 if FORMAT == "bf16" else 0x7E00 << 13
        TYPE: tl.constexpr = tl.int8 if STORAGE == "split8" else tl.int16
        short = tl.where(values == values, _to_wide(values, FORMAT), QUIET)
        if DROPPED > 0:
            odd = (short >> DROPPED) & 1
            short = (short + (odd + ((1 << (DROPPED - 1)) - 1))) >> DROPPED
        low = (short << (32 - KEPT)) >> (32 - KEPT)
        _store(beside, at, mask, low, TYPE, ALIGNED)
        _store(base, at, mask, (short - low) >> KEPT, tl.int16, ALIGNED)
    elif STORAGE == "kahan":
        # Source text: Kahan.store
        rounded = _nearest_16(values, FORMAT)
        excess = _from_16(rounded, FORMAT) - values
        lacking = -tl.where(is_finite(excess), excess, 0.0)
        _store(base, at, mask, rounded, tl.int16, ALIGNED)
        _store(beside, at, mask, _nearest_16(lacking, FORMAT), tl.int16, ALIGNED)
    elif STORAGE == "stochastic":
        bits = random_bits(key, place, offsets, ALIGNED)
        _store_at_random(base, at, mask, values, bits, FORMAT, ALIGNED)
    else:
        _store_nearest(base, at, mask, values, FORMAT, ALIGNED)


@triton.jit
def load_line(base, scales, at, group, mask, LINE: tl.constexpr, ALIGNED: tl.constexpr):
    """fp32 numbers of a line, and the scales of its groups ([groups, 1] fp32; 1 without groups).

    `group`: [groups, 1] which entries of `scales`; `LINE`: "fp32", "bf16" or "int8".
    """
    if LINE == "int8":
        # Source text: grouped.decode. A group begins in the tile with its first number.
        there = tl.max(mask.to(tl.int32), axis=1)[:, None] > 0
        scale = load_number(scales, group, there, "bf16", False)
        code = _load(base, at, mask, tl.int8, ALIGNED).to(tl.int32)
        c = code.to(tl.float32)
        values = c * (tl.abs(c) + _BEND) * scale
        return tl.where(code == _NOT_A_NUMBER, float("nan"), values), scale
    else:
        return load_number(base, at, mask, LINE, ALIGNED), 1.0


@triton.jit
def store_line(
    base, scales, at, group, mask, values, scale, moves, key, place, offsets,
    LINE: tl.constexpr, ALL_MOVE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write fp32 numbers of a line.

    `scale`: from `load_line`; `moves`: [groups, 64] bool, False where a number is stored as it was
    read (all True where ALL_MOVE).
    """
    if LINE == "int8":
        # Source text: grouped.encode, Int8.store
        bits = random_bits(key, place, offsets, ALIGNED)
        finite = is_finite(values)
        magnitude = tl.where(finite, tl.abs(values), 0.0)
        absmax = tl.max(magnitude, axis=1)[:, None]
        there = tl.max(mask.to(tl.int32), axis=1)[:, None] > 0
        if not ALL_MOVE:  # with the scale of before, codes of before are found again
            still = tl.max((mask & (moves == 0)).to(tl.int32), axis=1)[:, None] > 0
            absmax = tl.maximum(absmax, tl.where(still, scale * _HIGHEST, 0.0))
        least = tl.maximum(tl.math.div_rn(absmax, _HIGHEST), _SMALLEST_SCALE)
        pattern = (least.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
        scale = (pattern << 16).to(tl.float32, bitcast=True)
        # r = k + 16, so k (k + 32) = r r - 256 and the step is 2 r + 1. Fused where the product is
        # exact; conversions, of which few are done at a time, are sums with a power of two.
        r = tl.math.sqrt_rn(magnitude * tl.math.div_rn(1.0, scale) + _BEND * _BEND / 4)
        r = tl.floor(r)
        beyond = tl.math.fma(tl.math.fma(r, r, -_BEND * _BEND / 4), -scale, magnitude)
        part = 1.52587890625e-05 * scale  # 2**-16
        step = tl.math.fma(r, 2.0 * part, part)
        chance = (bits | 0x4B000000).to(tl.float32, bitcast=True) - 8388607.5  # bits + 1/2
        c = r + tl.where(beyond > chance * step, 1.0 - _BEND / 2, -_BEND / 2)
        sign = values.to(tl.int32, bitcast=True) & -0x80000000
        c = (c.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        code = (c + 12582912.0).to(tl.int32, bitcast=True)  # 3 * 2**22: the lowest byte is c's
        code = tl.where(finite, code, _NOT_A_NUMBER)
        _store(base, at, mask, code, tl.int8, ALIGNED)
        _store(scales, group, there, pattern, tl.int16, False)
    elif LINE == "bf16":
        _store_at_random(
            base, at, mask, values, random_bits(key, place, offsets, ALIGNED), LINE, ALIGNED
        )
    else:
        _store_nearest(base, at, mask, values, LINE, ALIGNED)
