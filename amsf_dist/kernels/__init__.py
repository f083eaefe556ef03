"""Where storage and rule meet: the loops over memory."""

from __future__ import annotations

from amsf_dist.kernels.chosen import measure, move_of, write
from amsf_dist.kernels.exact import add_scaled_squares, largest_square
from amsf_dist.kernels.factored import second_moments
from amsf_dist.kernels.grouping import Grouping
from amsf_dist.kernels.holding import Holding, Partition
from amsf_dist.kernels.move import Move
from amsf_dist.kernels.native import NativeMove
from amsf_dist.kernels.reference import assign_, average_, unaverage_
from amsf_dist.kernels.transfer import (
    add_means,
    gather_,
    gather_scales_,
    read_line,
    spread,
    spread_scales,
    take_means_,
    write_line_,
)

__all__ = [
    "Grouping",
    "Holding",
    "Move",
    "NativeMove",
    "Partition",
    "add_means",
    "add_scaled_squares",
    "assign_",
    "average_",
    "gather_",
    "gather_scales_",
    "largest_square",
    "measure",
    "move_of",
    "read_line",
    "second_moments",
    "spread",
    "spread_scales",
    "take_means_",
    "unaverage_",
    "write",
    "write_line_",
]
