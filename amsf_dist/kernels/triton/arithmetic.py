"""The arithmetic of the rules for one tile, in fp32.

The text of `Rule.move` and `Rule.block_scale` once more: Triton compiles neither methods nor
annotated functions. tests/equal/test_triton.py holds the two against each other bit for bit.
Roots and divisions round to nearest, as torch's do, so that all of it does.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FIELDS", "SCALARS", "is_finite", "moved", "second_moment"]

SCALARS = {
    "schedule_free": ("lr", "average", "direct", "keep", "decay"),
    "ema": ("lr", "keep", "forget1", "fresh1"),
}
"""Fields of a rule's coefficients in the order in which `moved` reads them."""

FIELDS = 9
"""Numbers per parameter in the table of coefficients: four of the second moment, then SCALARS."""


@triton.jit
def is_finite(x):
    """Neither infinite nor NaN."""
    return tl.abs(x) < float("inf")


@triton.jit
def second_moment(before, mean_sq, c, CLIP_BLOCKS: tl.constexpr):
    """(new moment, factor of the gradient): docs/algorithm.md (2), (3); `c`: the parameter's row.

    Source text: BlockMoments.block_scale.
    """
    after = tl.load(c) * before + tl.load(c + 1) * mean_sq
    root = tl.math.sqrt_rn(after * tl.load(c + 2))
    scale = tl.math.div_rn(1.0, root + tl.load(c + 3))
    if CLIP_BLOCKS:
        scale = tl.minimum(scale, tl.math.div_rn(1.0, tl.math.sqrt_rn(mean_sq)))
    return after, scale


@triton.jit
def moved(weight, grad, scale, line, decays, c, RULE: tl.constexpr):
    """(new weight, new line) of a tile; only + - *."""
    if RULE == "schedule_free":
        return _schedule_free(weight, grad, scale, line, decays, c + 4)
    else:
        return _ema(weight, grad, scale, line, decays, c + 4)


@triton.jit
def _schedule_free(weight, grad, scale, gap, decays, c):
    """docs/algorithm.md (6) to (8). Source text: ScheduleFree.move."""
    update = grad * (tl.load(c) * scale)
    if decays:
        update = update + tl.load(c + 4) * weight
    gap = gap + update
    weight = weight - tl.load(c + 1) * gap - tl.load(c + 2) * update
    return weight, tl.load(c + 3) * gap


@triton.jit
def _ema(weight, grad, scale, exp_avg, decays, c):
    """docs/algorithm.md (10), (11). Source text: Ema.move."""
    exp_avg = exp_avg + (tl.load(c + 3) * grad - tl.load(c + 2) * exp_avg)
    if decays:
        weight = tl.load(c + 1) * weight
    return weight - tl.load(c) * (exp_avg * scale), exp_avg
