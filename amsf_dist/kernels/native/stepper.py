"""The compiled kernel as a kernel of a lane."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from amsf_dist.kernels.choice import Kernel, Moves, Reference, by_parameter
from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.native.build import library
from amsf_dist.kernels.native.launch import NativeMove, measure, write
from amsf_dist.kernels.native.table import serves
from amsf_dist.rules.protocol import Coefficients

__all__ = ["NativeKernel", "split"]


def split(holdings: Sequence[Holding]) -> list[Kernel]:
    """Kernels for a lane's tensors: the compiled one where it can, the reference for the others."""
    served = [holding for holding in holdings if serves(holding)]
    if not served or library() is None:
        return [Reference(holdings)]
    others = [holding for holding in holdings if not serves(holding)]
    return [NativeKernel(served), *([Reference(others)] if others else [])]


class NativeKernel:
    """Steps tensors that `serves` accepts."""

    def __init__(self, holdings: Sequence[Holding]) -> None:
        """Step these."""
        self.holdings = holdings

    def measure(self, later: bool = False) -> None:
        """See `Kernel`."""
        if stepping := self._stepping():
            measure(stepping)

    def moves(
        self, c: Coefficients, draws: Tensor, finite: Tensor | None, by_block: bool
    ) -> Sequence[Moves]:
        """See `Kernel`. Steps that not everything may take are the reference's."""
        if finite is not None:
            return Reference(self.holdings).moves(c, draws, finite, by_block)
        rows, steps = by_parameter(c, draws)
        moves = [NativeMove.of(h, rows[h.index], steps[h.index]) for h in self._stepping()]
        return [_Together(moves)] if moves else []

    def _stepping(self) -> list[Holding]:
        return [holding for holding in self.holdings if holding.param.grad is not None]


class _Together:
    """All tensors of a lane, written by one call."""

    def __init__(self, moves: Sequence[NativeMove]) -> None:
        self._moves = moves

    def seek_peaks(self) -> None:
        """See `Moves`."""
        for move in self._moves:
            move.seek_peaks()

    def write(self) -> None:
        """See `Moves`."""
        write(self._moves)
