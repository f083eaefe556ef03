"""The launches of a step: a few for all tensors of a lane, however many they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.triton import measure as measuring
from amsf_dist.kernels.triton import moments
from amsf_dist.kernels.triton import move as moving
from amsf_dist.kernels.triton.columns import COLUMNS
from amsf_dist.kernels.triton.fits import storages
from amsf_dist.kernels.triton.tables import Programs, Tables

__all__ = ["Launch", "Scalars", "TritonMoves"]

_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Every product is rounded, as in torch: a fused one would differ in the last place."""


class Scalars(NamedTuple):
    """What a step has for a lane, on its device.

    Attributes:
        coefficients: [parameters, FIELDS] fp32.
        factors: [parameters] fp32, of the gradients.
        draws: [parameters] fp64, keys of the random numbers.
        verdict: 0-dim bool.
        by_block: whether every block decides for itself.
        clip_blocks: see `second_moment`.
    """

    coefficients: Tensor
    factors: Tensor
    draws: Tensor
    verdict: Tensor
    by_block: bool
    clip_blocks: bool


@dataclass
class Launch:
    """Tensors that step in the same launches.

    Attributes:
        holdings: that have a gradient.
        gradient: format of their gradients.
        tables: of them.
        addresses: [pieces, ADDRESS_FIELDS] of their weights and gradients in this step.
        programs: that work on them.
    """

    holdings: Sequence[Holding]
    gradient: str
    tables: Tables
    addresses: Tensor
    programs: Programs

    def measure(self) -> None:
        """Write the sums of blocks that are not measured where they are moved."""
        programs, tables = self.programs, self.tables
        with self.on_device():
            for (rows, columns, aligned), items in tables.measures.items():
                measuring.measure[(len(items),)](
                    items,
                    self.addresses,
                    GRADIENT=self.gradient,
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

            self._measure_columns()

    def _measure_columns(self) -> None:
        programs, tables = self.programs, self.tables.columns
        if tables.adds is None or tables.wholes is None:
            return
        options = {"COLUMNS": COLUMNS, "num_warps": programs.warps, **_OPTIONS}
        for aligned, items in tables.measures.items():
            measuring.measure_columns[(len(items),)](
                items,
                self.addresses,
                GRADIENT=self.gradient,
                ROWS=max(1, programs.columns // COLUMNS),
                ALIGNED=aligned,
                **options,
            )
        measuring.add_columns[(len(tables.adds),)](tables.adds, **options)
        options = {"NUMBERS": programs.columns, "num_warps": programs.warps, **_OPTIONS}
        measuring.add_parts[(len(tables.wholes),)](tables.wholes, **options)

    def advance(self, given: Scalars) -> Tensor:
        """Advance the moments of blocks; [blocks] fp32 factors of the gradient."""
        tables, programs = self.tables, self.programs
        scales = given.coefficients.new_empty(max(1, tables.num_scales))
        options = {
            "CLIP_BLOCKS": given.clip_blocks,
            "BY_BLOCK": given.by_block,
            "BLOCKS": programs.blocks,
            "num_warps": max(1, programs.blocks // 128),
            **_OPTIONS,
        }
        with self.on_device():
            # those of matrices first: they read what the other changes
            for kernel, items in (
                (moments.advance_matrices, tables.columns.moments),
                (moments.advance_moments, tables.moments),
            ):
                if items is not None:
                    kernel[(len(items),)](
                        items, tables.pieces, given.coefficients, given.verdict, scales, **options
                    )
        return scales

    def move(self, given: Scalars, scales: Tensor) -> None:
        """Write the weights and the lines."""
        tables, programs = self.tables, self.programs
        same = (tables.pieces, self.addresses, given.coefficients, given.factors, given.draws)
        options = self._options(given)
        with self.on_device():
            for (element, by_column, whole, aligned), items in tables.moves.items():
                moving.move[(len(items) * programs.tiles,)](
                    items,
                    *same,
                    given.verdict,
                    scales,
                    ELEMENT=element,
                    FACTORED=by_column,
                    WHOLE=whole,
                    BY_BLOCK=given.by_block,
                    ALIGNED=aligned,
                    **options,
                )
            for aligned, items in tables.fused.items():
                moving.measure_and_move[(len(items) * programs.tiles,)](
                    items, *same, ALIGNED=aligned, **options
                )

    def _options(self, given: Scalars) -> dict[str, Any]:
        holding = self.holdings[0]
        names = storages(holding)
        assert names is not None
        storage, form = names[0].split()
        return {
            "RULE": holding.rule.name,
            "STORAGE": storage,
            "FORMAT": form,
            "LINE": names[1],
            "GRADIENT": self.gradient,
            "DECAY_ALL": holding.group["decay"] == "all",
            "CLIP_BLOCKS": given.clip_blocks,
            "TILES": self.programs.tiles,
            "GROUPS": self.programs.groups,
            "num_warps": self.programs.warps,
            **_OPTIONS,
        }

    def on_device(self) -> Any:
        """Launches go to the device that is current."""
        device = self.addresses.device
        return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


class TritonMoves:
    """What is to be written by one launch."""

    def __init__(self, launch: Launch, given: Scalars) -> None:
        """Advance the moments of blocks."""
        self._launch, self._given = launch, given
        self._scales = launch.advance(given)

    def seek_peaks(self) -> None:
        """No group that ranks share is stepped here."""

    def write(self) -> None:
        """Move the weights and the lines."""
        self._launch.move(self._given, self._scales)
