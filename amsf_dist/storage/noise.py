"""Random bits without a state: a function of (seed, step, stream, index) and of nothing else.

A draw does not depend on the rank, the shard, the tile or the device that asks for it, so a run on
another world size, or resumed there, rounds with the same numbers.

A published generator twice, java.util.SplittableRandom (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014):

    key  = number `step` of nextLong() of SplittableRandom(mix64(seed) ^ stream)    one per step
    bits = number `index` of nextInt() of SplittableRandom(key)                     one per element

Number n of a seed is a 64-bit finalizer (Stafford's variants 13 and 4 of MurmurHash3's) of
seed + (n + 1) * GAMMA: access is random. 12 integer operations per element, three of them
multiplications; no table, no division, no host. Not for secrets.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["bits", "family_of", "stream_of"]

_Word = TypeVar("_Word", int, Tensor)


def _wrapped(word: _Word) -> _Word:
    """The word as int64 holds it; a tensor's arithmetic has wrapped by itself."""
    return (word + 2**63) % 2**64 - 2**63 if isinstance(word, int) else word


_GAMMA = _wrapped(0x9E3779B97F4A7C15)
_MIX64 = _wrapped(0xBF58476D1CE4E5B9), _wrapped(0x94D049BB133111EB)
_MIX32 = _wrapped(0x62A9D9ED799705F5), _wrapped(0xCB24D0A5C88C35B3)


def stream_of(name: str, role: str) -> int:
    """A 64-bit number for what is drawn for: the same in every process and Python version.

    Args:
        name: canonical name of the parameter.
        role: what its draws round: "weight", or a line's name.
    """
    text = f"{len(name)} {name} {role}"  # the length keeps ("a b", "c") and ("a", "b c") apart
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def family_of(seed: int, stream: int) -> int:
    """The seed of one stream's keys, as int64 holds it; see `bits`."""
    return _wrapped(_mix64(_wrapped(seed)) ^ _wrapped(stream))


def bits(index: Tensor, seed: int, step: int | Tensor, stream: int) -> Tensor:
    """32 random bits per element.

    Args:
        index: [...] int64, places of the elements in the whole parameter's line; not changed.
        seed: of the run, modulo 2**64.
        step: an int; or 0-dim int64 or fp64 (a whole number), on the device of `index` or on the
            host, which is not read.
        stream: from `stream_of`, modulo 2**64.

    Returns:
        [...] int32, every one of the 2**32 values equally likely.
    """
    family = family_of(seed, stream)
    # int64 wraps when it overflows, and `>>` repeats the sign: hence a mask after every shift
    word = index * _GAMMA
    if isinstance(step, Tensor):
        word += _number(family, step.to(torch.int64)) + _GAMMA
    else:
        word += _wrapped(_number(family, step) + _GAMMA)
    shifted = word >> 33
    shifted &= (1 << 31) - 1
    word ^= shifted
    word *= _MIX32[0]
    torch.bitwise_right_shift(word, 28, out=shifted)
    shifted &= (1 << 36) - 1
    word ^= shifted
    word *= _MIX32[1]
    word >>= 32
    return word.to(torch.int32)


def _number(seed: int, n: _Word) -> _Word:
    """Number n of nextLong()."""
    return _mix64(_wrapped(n * _GAMMA + _wrapped(seed + _GAMMA)))


def _mix64(z: _Word) -> _Word:
    z = _wrapped((z ^ (z >> 30 & (1 << 34) - 1)) * _MIX64[0])
    z = _wrapped((z ^ (z >> 27 & (1 << 37) - 1)) * _MIX64[1])
    return z ^ (z >> 31 & (1 << 33) - 1)
