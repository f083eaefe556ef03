"""The compiled CPU kernel: measure and move of all tensors of a lane in one call each.

Same results as `kernels/move.py`, bit for bit: the arithmetic is compiled without contraction, and
an element's result does not depend on its neighbours. Block sums are added in another order.
"""

from __future__ import annotations

from amsf_dist.kernels.native.stepper import NativeKernel

__all__ = ["NativeKernel"]
