"""Which kernel steps a tensor, and the calls that go to all of them.

A kernel is a module with `serves(holding)`, `measure(holdings)` and `write(moves)`, and something
to make of a holding that `write` takes. What none serves is stepped by torch operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from amsf_dist.kernels import native, reference
from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.move import Move
from amsf_dist.kernels.native import NativeMove
from amsf_dist.rules.protocol import Coefficients, Scalar

__all__ = ["kernel_of", "measure", "move_of", "write"]


def kernel_of(holding: Holding) -> ModuleType:
    """The module whose kernel steps this tensor; `reference` where no other does.

    Args:
        holding: any; a gradient is not needed.
    """
    if holding.kernel is None:
        compiled = native.wanted() and native.serves(holding) and native.library() is not None
        holding.kernel = native if compiled else reference
    return holding.kernel


def measure(holdings: Sequence[Holding]) -> None:
    """Add grad**2 of every block this rank sees to its partition's sums (docs/algorithm.md (2)).

    Args:
        holdings: with gradients.
    """
    compiled = []
    for holding in holdings:
        if kernel_of(holding) is native:
            compiled.append(holding)
        else:
            reference.sum_of_squares(holding)
    if compiled:
        native.measure(compiled)


def move_of(
    holding: Holding, c: Coefficients, step: Scalar, finite: Tensor | None, by_block: bool
) -> Move | NativeMove:
    """One tensor's step; see `Move` for the arguments."""
    if finite is None and kernel_of(holding) is native:
        return NativeMove.of(holding, c, step)
    return Move(holding, c, step, finite, by_block)


def write(moves: Sequence[Move | NativeMove]) -> None:
    """Move the weights and the lines."""
    compiled = []
    for move in moves:
        if isinstance(move, NativeMove):
            compiled.append(move)
        else:
            move.write()
    if compiled:
        native.write(compiled)
