"""Which program sums which columns of factored matrices; their rows are blocks like any others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.triton.fits import ALIGNED, FP32
from amsf_dist.shards import Piece

__all__ = ["COLUMNS", "ColumnTables", "Columns"]

COLUMNS = 128
"""Of a matrix, that one program sums."""

_Items = list[list[int]]


class ColumnTables(NamedTuple):
    """Of some tensors; int64, a row per item.

    Attributes:
        measures: aligned -> items of `measure_columns`.
        adds: items of `add_columns`; None: there are no columns here.
        wholes: items of `add_parts`, which come after those.
        parts: fp32, sums of columns over some rows.
        moments: items of `advance_matrices`; None: nothing is factored.
    """

    measures: dict[bool, Tensor]
    adds: Tensor | None
    wholes: Tensor | None
    parts: Tensor
    moments: Tensor | None


@dataclass
class Columns:
    """The same as lists, while the tables are made."""

    _measures: dict[bool, _Items] = field(default_factory=dict)
    _adds: _Items = field(default_factory=list)
    _wholes: _Items = field(default_factory=list)
    _moments: _Items = field(default_factory=list)
    # by piece: numbers of scratch, and the items that have a place in it
    _places: list[tuple[int, _Items, _Items]] = field(default_factory=list)

    def add(self, holding: Holding, piece: Piece, number: int, strip: int, fine: bool) -> None:
        """Add a factored piece, whose columns are to be measured.

        Args:
            holding: the tensor.
            piece: of it, in whole rows.
            number: of the piece in the table of pieces.
            strip: rows that a program sums.
            fine: whether all of its addresses are aligned.
        """
        columns, whole = piece.others
        length = columns.num_blocks
        strips = [
            (run.offset + at, min(strip * length, run.numel - at) // length)
            for run in piece.runs
            for at in range(0, run.numel, strip * length)
        ]
        if not strips:
            return
        sums = holding.partitions[1].sums.data_ptr() + FP32 * columns.first_sum
        items, adds = [], []
        for at in range(0, length, COLUMNS):
            count = min(COLUMNS, length - at)
            adds.append([at, len(strips), length, count, sums + FP32 * at])
            for part, (start, rows) in enumerate(strips):
                aligned = fine and start % ALIGNED == 0 and length % ALIGNED == 0
                items.append([number, start + at, length, rows, count, part * length + at])
                self._measures.setdefault(aligned, []).append(items[-1])
        self._adds += adds
        self._places.append((len(strips) * length, items, adds))
        total = holding.partitions[2].sums.data_ptr() + FP32 * whole.first_sum
        self._wholes.append([sums, length, total])

    def advance(
        self, holding: Holding, piece: Piece, number: int, first: int, blocks: int
    ) -> list[int]:
        """Add a factored piece, whose moments are to be advanced.

        Args:
            holding: the tensor.
            piece: of it.
            number: of the piece in the table of pieces.
            first: place in `scales` of its first row's factor; then come those of the columns, and
                one more.
            blocks: per program.

        Returns:
            An item of `advance_moments`, of the whole matrix.
        """
        ways = []
        for partition, cut in zip(holding.partitions, (piece, *piece.others), strict=True):
            moments = partition.moments.data_ptr() + FP32 * cut.first_block
            sums = partition.sums.data_ptr() + FP32 * cut.first_sum
            ways.append((moments, sums, cut.num_blocks, cut.part.blocks.block_numel))
        *vectors, (moment, sum_, _, numel) = ways
        for is_row, (moments, sums, count, block_numel) in zip((1, 0), vectors, strict=True):
            for at in range(0, count, blocks):
                skipped, here = FP32 * at, min(blocks, count - at)
                of_blocks = [number, moments + skipped, sums + skipped, first + at, here]
                of_whole = [moment, sum_, numel, is_row]
                self._moments.append([*of_blocks, block_numel, *of_whole])
            first += count
        return [number, moment, sum_, first, 1, numel]

    def tables(self, device: torch.device) -> ColumnTables:
        """On the device; places in scratch become addresses, so call it once."""
        parts = torch.zeros(sum(numel for numel, _, _ in self._places), device=device)
        at = parts.data_ptr()
        for numel, items, adds in self._places:
            for item in items:
                item[-1] = at + FP32 * item[-1]
            for add in adds:
                add[0] = at + FP32 * add[0]
            at += FP32 * numel

        def table(rows: _Items) -> Tensor:
            return torch.tensor(rows, dtype=torch.int64).to(device)

        return ColumnTables(
            {aligned: table(items) for aligned, items in self._measures.items()},
            table(self._adds) if self._adds else None,
            table(self._wholes) if self._wholes else None,
            parts,
            table(self._moments) if self._moments else None,
        )
