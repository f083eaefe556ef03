"""The compiled kernel as a kernel of a lane."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from amsf_dist.kernels.choice import Kernel, Moves, Reference
from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.native.build import library
from amsf_dist.kernels.native.launch import Table
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
        self._table = Table(())

    def measure(self, later: bool = False) -> bool:
        """See `Kernel`."""
        table = self._stepping()
        return table is None or table.measure()

    def moves(
        self, c: Coefficients, draws: Tensor, finite: Tensor | None, by_block: bool
    ) -> Sequence[Moves]:
        """See `Kernel`. Steps that not everything may take are the reference's."""
        if finite is not None:
            return Reference(self.holdings).moves(c, draws, finite, by_block)
        table = self._stepping()
        return [table.moves(c, draws)] if table else []

    def _stepping(self) -> Table | None:
        """The tensors that have a gradient, mostly the same ones in every step."""
        holdings = [holding for holding in self.holdings if holding.param.grad is not None]
        if not self._table.serves(holdings):
            self._table = Table(holdings)
        return self._table if holdings else None
