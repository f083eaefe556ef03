"""The compiled CPU kernel: measure and move of all tensors of a unit in one call each.

Same results as `kernels/move.py`, bit for bit: the arithmetic is compiled without contraction, and
an element's result does not depend on its neighbours. Block sums are added in another order.
"""

from __future__ import annotations

from amsf_dist.kernels.native.build import NoKernel, library, wanted
from amsf_dist.kernels.native.launch import NativeMove, measure, write
from amsf_dist.kernels.native.table import serves

__all__ = ["NativeMove", "NoKernel", "library", "measure", "serves", "wanted", "write"]
