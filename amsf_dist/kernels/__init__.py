"""Where storage and rule meet: the loops over memory."""

from __future__ import annotations

from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.reference import average_, gather_, move_, spread, sum_of_squares

__all__ = ["Holding", "average_", "gather_", "move_", "spread", "sum_of_squares"]
