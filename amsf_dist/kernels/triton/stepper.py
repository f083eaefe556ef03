"""The Triton kernels as a kernel of a lane: tables, addresses and coefficients of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amsf_dist.kernels.choice import Kernel, Moves, Reference
from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.triton.arithmetic import FIELDS, SCALARS
from amsf_dist.kernels.triton.fits import FORMATS, Stretch, storages, stretches
from amsf_dist.kernels.triton.launch import Launch, Scalars, TritonMoves
from amsf_dist.kernels.triton.tables import Programs, Tables, build
from amsf_dist.rules.protocol import Coefficients

__all__ = ["TritonKernel", "split"]

_KEPT = 8
"""Tables: for so many sets of parameters that got a gradient."""


def split(holdings: Sequence[Holding]) -> list[Kernel]:
    """Kernels for a lane's tensors: Triton where it can, the reference for the others."""
    alike: dict[tuple[str, str], list[tuple[Holding, list[list[Stretch]]]]] = {}
    others: list[Holding] = []
    for holding in holdings:
        names = storages(holding)
        found = stretches(holding) if names is not None else None
        if names is None or found is None:
            others.append(holding)
        else:
            alike.setdefault(names, []).append((holding, found))
    kernels: list[Kernel] = [TritonKernel(list(those)) for those in alike.values()]
    return kernels + ([Reference(others)] if others else [])


class TritonKernel:
    """Steps tensors of a lane whose storages are alike."""

    finite: bool | None = None
    programs = Programs()

    def __init__(self, found: Sequence[tuple[Holding, list[list[Stretch]]]]) -> None:
        """Step these.

        Args:
            found: tensors, with their `fits.stretches`.
        """
        self.holdings: Sequence[Holding] = [holding for holding, _ in found]
        self._stretches = {id(holding): parts for holding, parts in found}
        self._tables: dict[tuple[Any, ...], Tables] = {}
        self._addresses: dict[int, tuple[list[int], Tensor]] = {}
        self._captured: list[Any] = []
        self._device = self.holdings[0].exp_avg_sq.device
        self._yes = torch.ones((), dtype=torch.bool, device=self._device)
        self._ones: Tensor | None = None
        self._fuses = False

    def measure(self, later: bool = False) -> None:
        """See `Kernel`."""
        self._fuses = later
        launches, others = self._launches()
        for launch in launches:
            launch.measure()
        Reference(others).measure()

    def moves(
        self, c: Coefficients, draws: Tensor, finite: Tensor | None, by_block: bool
    ) -> Sequence[Moves]:
        """See `Kernel`."""
        launches, others = self._launches()
        scalars = Scalars(
            self._coefficients(c, len(draws)),
            self._factors(len(draws)),
            draws,
            self._yes if finite is None else finite,
            by_block,
            c.clip_blocks,
        )
        moves: list[Moves] = [TritonMoves(launch, scalars) for launch in launches]
        return [*moves, *Reference(others).moves(c, draws, finite, by_block)]

    def _launches(self) -> tuple[list[Launch], list[Holding]]:
        """The tensors that have a gradient, and those of them whose memory is not as it should be.

        Nothing here waits for the device: addresses are known on the host.
        """
        alike: dict[str, list[tuple[Holding, int, int]]] = {}
        others = []
        for holding in self.holdings:
            grad = holding.param.grad
            if grad is None:
                continue
            weight, gradient = holding.memory(holding.param), holding.memory(grad)
            name = FORMATS.get(gradient.dtype)
            if name is None or not (weight.is_contiguous() and gradient.is_contiguous()):
                others.append(holding)
            else:
                place = weight.data_ptr(), gradient.data_ptr()
                alike.setdefault(name, []).append((holding, *place))
        launches = []
        for name, those in alike.items():
            holdings = [holding for holding, _, _ in those]
            aligned = tuple(not (weight | gradient) % 16 for _, weight, gradient in those)
            seeds = tuple(dict.fromkeys(holding.group["seed"] for holding in holdings))
            key = (tuple(map(id, holdings)), aligned, seeds, self._fuses)
            if key not in self._tables:
                if len(self._tables) >= _KEPT:
                    self._tables.pop(next(iter(self._tables)))
                found = [self._stretches[id(holding)] for holding in holdings]
                self._tables[key] = build(holdings, found, aligned, self.programs, self._fuses)
            flat = [
                number
                for holding, weight, gradient in those
                for _ in holding.layout.pieces
                for number in (weight, gradient)
            ]
            tables = self._tables[key]
            addresses = self._on_device(tables, flat)
            launches.append(Launch(holdings, name, tables, addresses, self.programs))
        return launches, others

    def _on_device(self, tables: Tables, addresses: list[int]) -> Tensor:
        """The addresses as a tensor, copied only when they have changed."""
        known = self._addresses.get(id(tables))
        if known is not None and known[0] == addresses:
            return known[1]
        host = torch.tensor(addresses, dtype=torch.int64)
        if self._device.type == "cpu":
            copied = host
        else:
            host = host.pin_memory()
            copied = host.to(self._device, non_blocking=True)
            if torch.cuda.is_current_stream_capturing():
                # the graph copies them again whenever it runs; until then there is nothing in it
                self._captured.append((host, copied))
                return copied
        self._addresses[id(tables)] = addresses, copied
        return copied

    def _coefficients(self, c: Coefficients, count: int) -> Tensor:
        """[count, FIELDS] fp32, worked out on the device."""
        one_over = 1.0 / c.bias_correction2
        columns = [c.carry2, c.fresh2, one_over, c.eps]
        columns += [getattr(c, name) for name in SCALARS[self.holdings[0].rule.name]]
        columns += [0.0] * (FIELDS - len(columns))
        return torch.stack([self._column(column, count) for column in columns], 1).float()

    def _column(self, column: Tensor | float, count: int) -> Tensor:
        if isinstance(column, Tensor):
            return column.to(torch.float64)
        return torch.full((count,), column, dtype=torch.float64, device=self._device)

    def _factors(self, count: int) -> Tensor:
        """[count] fp32, of the gradients."""
        if self._ones is None or len(self._ones) != count:
            self._ones = torch.ones(count, device=self._device)
        factors = self.holdings[0].factors  # of the lane: one group, which clips or does not
        return self._ones if factors is None else factors.float()
