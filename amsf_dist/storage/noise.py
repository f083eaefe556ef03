"""Random bits without a state: a function of (seed, step, stream, index) and of nothing else.

A draw does not depend on the rank, the shard, the tile or the device that asks for it, so a run on
another world size, or resumed there, rounds with the same numbers.

A published generator twice, java.util.SplittableRandom (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014):

    key  = number `step` of nextLong() of SplittableRandom(mix64(seed) ^ stream)    one per step
    word = number `index // 8` of nextLong() of SplittableRandom(key)      one for eight elements
    bits = 16 bits of it, the lowest for the first of the eight, the next for the second; of the
           word rotated left by 8 for the last four                              one per element

The higher 8 bits of an element are nobody else's higher 8 bits: eight elements round up or down
independently, but for one case in 256. Who asks for 17 bits gets one that is a neighbour's too: 0
to 16 of the word, 15 to 31, 32 to 48, 47 to 63.

Number n of a seed is a 64-bit finalizer (Stafford's variant 13 of MurmurHash3's) of
seed + (n + 1) * GAMMA: access is random. What knows that its elements are neighbours has eight
of them for 12 integer operations, three of them multiplications; no table, no division, no host. 16
bits are what bf16 cuts off, 17 what int8 does, so nothing finer is needed. Not for secrets.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["GAMMA", "MIX64", "bits", "family_of", "stream_of"]

_Word = TypeVar("_Word", int, Tensor)


def _wrapped(word: _Word) -> _Word:
    """The word as int64 holds it; a tensor's arithmetic has wrapped by itself."""
    return (word + 2**63) % 2**64 - 2**63 if isinstance(word, int) else word


GAMMA = _wrapped(0x9E3779B97F4A7C15)
MIX64 = _wrapped(0xBF58476D1CE4E5B9), _wrapped(0x94D049BB133111EB)


def stream_of(name: str, role: str) -> int:
    """A 64-bit number for what is drawn for: the same in every process and Python version.

    Args:
        name: canonical name of the parameter.
        role: what its draws round: "weight", or a line's name.
    """
    text = f"{len(name)} {name} {role}"  # the length keeps ("a b", "c") and ("a", "b c") apart
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def bits(index: Tensor, seed: int, step: int | Tensor, stream: int, count: int = 16) -> Tensor:
    """Random bits per element.

    Args:
        index: [...] int64, places of the elements in the whole parameter's line; not changed.
        seed: of the run, modulo 2**64.
        step: an int; or 0-dim int64 or fp64 (a whole number), on the device of `index` or on the
            host, which is not read.
        stream: from `stream_of`, modulo 2**64.
        count: of bits, 16 or 17.

    Returns:
        [...] int32, every one of 0 to 2**count - 1 equally likely.
    """
    family = family_of(seed, stream)
    # int64 wraps when it overflows, and `>>` repeats the sign: hence a mask after every shift
    word = (index >> 3).mul_(GAMMA)
    if isinstance(step, Tensor):
        word += _number(family, step.to(torch.int64)) + GAMMA
    else:
        word += _wrapped(_number(family, step) + GAMMA)
    shifted = torch.empty_like(word)
    for shift, factor in ((30, MIX64[0]), (27, MIX64[1]), (31, 1)):
        torch.bitwise_right_shift(word, shift, out=shifted)
        word ^= shifted.bitwise_and_((1 << 64 - shift) - 1)
        word *= factor
    rotated = (word >> 56).bitwise_and_(0xFF).bitwise_or_(word << 8)
    word = torch.where((index & 4).bool(), rotated, word)
    torch.bitwise_and(index, 3, out=shifted).mul_(16)
    if count == 17:
        shifted -= index & 1
    word >>= shifted
    return word.to(torch.int32).bitwise_and_((1 << count) - 1)


def family_of(seed: int, stream: int) -> int:
    """The seed of a stream's keys, as int64 holds it; see `bits` for the arguments."""
    return _wrapped(_mix64(_wrapped(seed)) ^ _wrapped(stream))


def _number(seed: int, n: _Word) -> _Word:
    """Number n of nextLong()."""
    return _mix64(_wrapped(n * GAMMA + _wrapped(seed + GAMMA)))


def _mix64(z: _Word) -> _Word:
    z = _wrapped((z ^ (z >> 30 & (1 << 34) - 1)) * MIX64[0])
    z = _wrapped((z ^ (z >> 27 & (1 << 37) - 1)) * MIX64[1])
    return z ^ (z >> 31 & (1 << 33) - 1)
