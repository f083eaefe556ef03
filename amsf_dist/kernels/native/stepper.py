"""The compiled kernel as a kernel of a lane."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import NamedTuple

from torch import Tensor

from amsf_dist.kernels.choice import Kernel, Moves, Reference
from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.native.build import library
from amsf_dist.kernels.native.launch import Table, parted
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
        self.finite: bool | None = True
        self._twice = self._once = Table(())
        self._looked = self._later = False
        self._stepping: list[Holding] = []
        self._parted: dict[int, tuple[list[Holding], list[Holding]]] = {}

    def measure(self, later: bool = False) -> None:
        """See `Kernel`."""
        self._look(later)
        self.finite = not self._twice.holdings or self._twice.measure()

    def moves(
        self, c: Coefficients, draws: Tensor, finite: Tensor | None, by_block: bool
    ) -> Sequence[Moves]:
        """See `Kernel`. Steps that not everything may take are the reference's."""
        if not self._looked:  # the sums are those of others
            self._look(later=False)
        self._looked = False
        moves: list[Moves] = []
        if self._once.holdings:
            moves.append(_InOnePass(self, self._once, c, draws))
        if self._twice.holdings and finite is None:
            moves.append(self._twice.moves(c, draws))
        elif self._twice.holdings:
            moves += Reference(self._twice.holdings).moves(c, draws, finite, by_block)
        return moves

    def _look(self, later: bool) -> None:
        """Find the tensors that have a gradient, mostly the same ones in every step."""
        stepping = [holding for holding in self.holdings if holding.param.grad is not None]
        self._looked = True
        alike = later == self._later and len(stepping) == len(self._stepping)
        if alike and all(map(is_, stepping, self._stepping)):
            if self._once.is_current() and self._twice.is_current():
                return
        self._later, self._stepping = later, stepping
        once, twice = [], list(stepping)
        if later:
            for holding in stepping:
                if id(holding) not in self._parted:
                    self._parted[id(holding)] = parted(holding)
            parts = [self._parted[id(holding)] for holding in stepping]
            once = [part for own, _ in parts for part in own]
            twice = [part for _, own in parts for part in own]
        self._once, self._twice = Table(once), Table(twice)


class _InOnePass(NamedTuple):
    """What is still to be measured and written; see `Moves`."""

    kernel: NativeKernel
    table: Table
    c: Coefficients
    draws: Tensor

    def seek_peaks(self) -> None:
        """No groups are shared."""

    def write(self) -> None:
        """See `Table.step`."""
        all_finite = self.table.step(self.c, self.draws)
        self.kernel.finite = bool(self.kernel.finite) and all_finite
