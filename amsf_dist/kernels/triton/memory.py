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
_CUT = tl.constexpr(grouped.CUT_BITS)
_SMALLEST_SCALE = tl.constexpr(grouped.SMALLEST_SCALE)
_LIMIT = tl.constexpr(grouped.LIMIT)
_HIGHEST = tl.constexpr(127 << grouped.CUT_BITS)
_THIRD = tl.constexpr(grouped.THIRD)
_NEXT = tl.constexpr(1 << grouped.CUT_BITS)


@triton.jit
def _load(base, at, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Numbers at `base` (int64 address) + `at`."""
    pointer = base.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 8 if TYPE == tl.int8 else 16)
    return tl.load(pointer + at, mask=mask, other=0)


@triton.jit
def _store(base, at, mask, values, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = base.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 8 if TYPE == tl.int8 else 16)
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
        bits = random_bits(key, place, offsets, 16, ALIGNED)
        _store_at_random(base, at, mask, values, bits, FORMAT, ALIGNED)
    else:
        _store_nearest(base, at, mask, values, FORMAT, ALIGNED)


@triton.jit
def _larger(a, b):
    """NaN, if one of them is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reached(scale):
    """What code 127 stands for; scales are patterns of fp32."""
    highest = (scale + _HIGHEST).to(tl.float32, bitcast=True)
    return highest - scale.to(tl.float32, bitcast=True)


@triton.jit
def _scale_of(absmax):
    """Source text: grouped._scales."""
    third = (absmax * _THIRD).to(tl.int32, bitcast=True)
    scale = ((third + (2 * _NEXT - 1)) >> _CUT) << _CUT
    scale = tl.where(_reached(scale) < absmax, scale + _NEXT, scale)
    return tl.maximum(scale, _SMALLEST_SCALE)


@triton.jit
def load_line(base, scales, at, group, mask, there, LINE: tl.constexpr, ALIGNED: tl.constexpr):
    """fp32 numbers of a line, and patterns of its groups' scales ([groups, 1]; 1 without groups).

    `group`: [groups, 1] which entries of `scales`; `there`: [groups, 1] bool, whether they begin
    in the tile; `LINE`: "fp32", "bf16" or "int8".
    """
    if LINE == "int8":
        # Source text: grouped.decode. A group begins in the tile with its first number.
        scale = _load(scales, group, there, tl.int16, False).to(tl.int32) << 16
        code = _load(base, at, mask, tl.int8, ALIGNED).to(tl.int32)
        raised = (((code & 127) << _CUT) + scale) | (code & -0x80000000)
        first = scale | (code & -0x80000000)
        return raised.to(tl.float32, bitcast=True) - first.to(tl.float32, bitcast=True), scale
    else:
        return load_number(base, at, mask, LINE, ALIGNED), 1.0


@triton.jit
def store_line(
    base, scales, at, group, mask, there, values, scale, moves, key, place, offsets,
    LINE: tl.constexpr, ALL_MOVE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write fp32 numbers of a line.

    `scale`: from `load_line`; `moves`: [groups, 64] bool, False where a number is stored as it was
    read (all True where ALL_MOVE).
    """
    if LINE == "int8":
        # Source text: grouped.encode, Int8.store
        bits = random_bits(key, place, offsets, _CUT, ALIGNED)
        absmax = tl.reduce(tl.abs(values), 1, _larger)[:, None]
        if not ALL_MOVE:  # with the scale of before, codes of before are found again
            still = tl.max((mask & (moves == 0)).to(tl.int32), axis=1)[:, None] > 0
            absmax = tl.maximum(absmax, tl.where(still, _reached(scale), 0.0))
        scale = _scale_of(absmax)
        serves = absmax < _LIMIT
        sign = values.to(tl.int32, bitcast=True) & -0x80000000
        raised = values + (scale | sign).to(tl.float32, bitcast=True)
        pattern = raised.to(tl.int32, bitcast=True) - scale + bits
        code = (pattern >> _CUT) & 127
        code = tl.where((code != 0) & serves, code | ((sign >> 24) & -128), 0)
        _store(base, at, mask, code, tl.int8, ALIGNED)
        _store(scales, group, there, tl.where(serves, scale >> 16, 0x7FC0), tl.int16, False)
    elif LINE == "bf16":
        bits = random_bits(key, place, offsets, 16, ALIGNED)
        _store_at_random(base, at, mask, values, bits, LINE, ALIGNED)
    else:
        _store_nearest(base, at, mask, values, LINE, ALIGNED)
