"""The launches of a step: a few for all tensors of a lane, however many they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amsf_dist.kernels.choice import Kernel, Moves, Reference
from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.triton import measure as measuring
from amsf_dist.kernels.triton import move as moving
from amsf_dist.kernels.triton.arithmetic import FIELDS, SCALARS
from amsf_dist.kernels.triton.fits import FORMATS, Stretch, line_name, stretches, weight_name
from amsf_dist.kernels.triton.tables import Programs, Tables, build
from amsf_dist.rules.protocol import Coefficients

__all__ = ["TritonKernel", "split"]

_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Every product is rounded, as in torch: a fused one would differ in the last place."""

_KEPT = 8
"""Tables: for so many sets of parameters that got a gradient."""


def split(holdings: Sequence[Holding]) -> list[Kernel]:
    """Kernels for a lane's tensors: Triton where it can, the reference for the others."""
    alike: dict[tuple[str, str], list[tuple[Holding, list[list[Stretch]]]]] = {}
    others: list[Holding] = []
    for holding in holdings:
        storages = _storages(holding)
        found = stretches(holding) if storages is not None else None
        if storages is None or found is None:
            others.append(holding)
        else:
            alike.setdefault(storages, []).append((holding, found))
    kernels: list[Kernel] = [TritonKernel(list(those)) for those in alike.values()]
    return kernels + ([Reference(others)] if others else [])


def _storages(holding: Holding) -> tuple[str, str] | None:
    """Of weights (with the format) and of the line, if memory.py knows them."""
    known = holding.rule.name in SCALARS and len(holding.lines) == 1
    if not known or holding.exp_avg_sq.dtype != torch.float32:
        return None
    weight, line = weight_name(holding.weight_storage), line_name(holding.lines[0].storage)
    if weight is None or line is None or holding.param.dtype not in FORMATS:
        return None
    state = [*holding.errors, *holding.lines[0].by_number]
    if not all(tensor.is_contiguous() for tensor in [*state, holding.memory(holding.param)]):
        return None
    return f"{weight} {FORMATS[holding.param.dtype]}", line


@dataclass
class _Class:
    """What steps in the same launches: tensors whose gradients have one format.

    Attributes:
        holdings: that have a gradient.
        gradient: its format.
        tables: of them.
        addresses: [pieces, ADDRESS_FIELDS] of their weights and gradients in this step.
    """

    holdings: list[Holding]
    gradient: str
    tables: Tables
    addresses: Tensor


class TritonKernel:
    """Steps tensors of a lane whose storages are alike."""

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

    def measure(self) -> None:
        """See `Kernel`."""
        classes, others = self._classes()
        with _on(self._device):
            for one in classes:
                self._measure(one)
        Reference(others).measure()

    def moves(
        self, c: Coefficients, draws: Tensor, finite: Tensor | None, by_block: bool
    ) -> Sequence[Moves]:
        """See `Kernel`."""
        classes, others = self._classes()
        table = self._coefficients(c, len(draws))
        factors = self._factors(len(draws))
        moves: list[Moves] = []
        for one in classes:
            verdict = self._yes if finite is None else finite
            moves.append(_TritonMoves(self, one, table, factors, draws, verdict, by_block, c))
        return [*moves, *Reference(others).moves(c, draws, finite, by_block)]

    def _classes(self) -> tuple[list[_Class], list[Holding]]:
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
        classes = []
        for name, those in alike.items():
            holdings = [holding for holding, _, _ in those]
            aligned = tuple(not (weight | gradient) % 16 for _, weight, gradient in those)
            seeds = tuple(dict.fromkeys(holding.group["seed"] for holding in holdings))
            key = (tuple(map(id, holdings)), aligned, seeds)
            if key not in self._tables:
                if len(self._tables) >= _KEPT:
                    self._tables.pop(next(iter(self._tables)))
                found = [self._stretches[id(holding)] for holding in holdings]
                self._tables[key] = build(holdings, found, aligned, self.programs)
            flat = [
                number
                for holding, weight, gradient in those
                for _ in holding.layout.pieces
                for number in (weight, gradient)
            ]
            tables = self._tables[key]
            classes.append(_Class(holdings, name, tables, self._on_device(tables, flat)))
        return classes, others

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

    def _measure(self, one: _Class) -> None:
        programs, tables = self.programs, one.tables
        for (rows, columns, aligned), items in tables.measures.items():
            measuring.measure[(len(items),)](
                items,
                one.addresses,
                GRADIENT=one.gradient,
                ROWS=rows,
                COLUMNS=columns,
                ALIGNED=aligned,
                num_warps=programs.warps,
                **_OPTIONS,
            )
        if tables.adds is not None:
            measuring.add_parts[(len(tables.adds),)](
                tables.adds, NUMBERS=programs.columns, num_warps=programs.warps, **_OPTIONS
            )

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
        if all(holding.factor is None for holding in self.holdings):
            return self._ones
        factors = list(self._ones.unbind())
        for holding in self.holdings:
            if holding.factor is not None:
                factors[holding.index] = holding.factor
        return torch.stack(factors)


@dataclass
class _TritonMoves:
    """What is to be written of one class."""

    kernel: TritonKernel
    one: _Class
    coefficients: Tensor
    factors: Tensor
    draws: Tensor
    verdict: Tensor
    by_block: bool
    c: Coefficients

    def __post_init__(self) -> None:
        """Advance the moments of blocks."""
        tables, programs = self.one.tables, self.kernel.programs
        self._scales = self.draws.new_empty(max(1, tables.num_scales), dtype=torch.float32)
        if tables.moments is None:
            return
        with _on(self._scales.device):
            measuring.advance_moments[(len(tables.moments),)](
                tables.moments,
                tables.pieces,
                self.coefficients,
                self.verdict,
                self._scales,
                CLIP_BLOCKS=self.c.clip_blocks,
                BY_BLOCK=self.by_block,
                BLOCKS=programs.blocks,
                num_warps=max(1, programs.blocks // 128),
                **_OPTIONS,
            )

    def seek_peaks(self) -> None:
        """No group that ranks share is stepped here."""

    def write(self) -> None:
        """Move the weights and the lines."""
        holding, programs = self.one.holdings[0], self.kernel.programs
        storages = _storages(holding)
        assert storages is not None
        storage, form = storages[0].split()
        with _on(self._scales.device):
            for (element, aligned), items in self.one.tables.moves.items():
                moving.move[(len(items) * programs.tiles,)](
                    items,
                    self.one.tables.pieces,
                    self.one.addresses,
                    self.coefficients,
                    self.factors,
                    self.draws,
                    self.verdict,
                    self._scales,
                    RULE=holding.rule.name,
                    ELEMENT=element,
                    STORAGE=storage,
                    FORMAT=form,
                    LINE=storages[1],
                    GRADIENT=self.one.gradient,
                    DECAY_ALL=holding.group["decay"] == "all",
                    CLIP_BLOCKS=self.c.clip_blocks,
                    BY_BLOCK=self.by_block,
                    ALIGNED=aligned,
                    TILES=programs.tiles,
                    GROUPS=programs.groups,
                    num_warps=programs.warps,
                    **_OPTIONS,
                )


def _on(device: torch.device) -> Any:
    """Launches go to the device that is current."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
