"""The step of one tensor, tile by tile: second moments, weights and lines, in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amsf_dist.kernels import factored
from amsf_dist.kernels.draws import Draws
from amsf_dist.kernels.holding import WEIGHT, Holding
from amsf_dist.kernels.lines import (
    flat_line,
    flat_lines,
    flat_tensors,
    load_lines,
    put_all_back,
    put_lines_back,
)
from amsf_dist.kernels.tiles import Tile
from amsf_dist.rules.protocol import Coefficients, Scalar
from amsf_dist.shards import Piece

__all__ = ["Move", "Opened", "Scaled"]


class Scaled(NamedTuple):
    """The gradient's factor and where to apply it, for a piece's blocks."""

    scale: Tensor
    finite: Tensor | None  # as `scale`, or 0-dim, or None: everywhere
    columns: Tensor | None = None  # a second factor, one per column


class _Moved(NamedTuple):
    """What a step makes of a tile; nothing is written yet."""

    weight: Tensor
    lines: tuple[Tensor, ...]
    moments: Tensor | None  # of element blocks, which are not part of `Scaled`
    finite: Tensor | None


class Move:
    """One tensor's step once its block sums are agreed.

    Second moments advance when it is made, unless every element has its own; weights and lines are
    written by `write`. Where lines are stored in groups, `seek_peaks` goes before it, and ranks
    agree on the peaks (amsf_dist/peaks.py).
    """

    def __init__(
        self,
        holding: Holding,
        c: Coefficients,
        step: Scalar,
        finite: Tensor | None,
        by_block: bool,
    ) -> None:
        """Advance the moments of blocks.

        Args:
            holding: has a gradient; its `sums` hold the agreed block sums.
            c: the rule's scalars for this parameter.
            step: its count of steps, this one included: a key of stochastic rounding.
            finite: 0-dim bool on the weights' device: where False nothing changes. None when the
                host knows that all is finite, which saves the comparison.
            by_block: decide block by block instead, from the block's own sum.
        """
        self._holding, self._c, self._step = holding, c, step
        self._finite, self._by_block = finite, by_block
        self._factor = holding.factor
        # also of pieces of which nothing lies here: their moments may be kept by all their ranks
        self.scaled = [
            None if piece.part.elementwise else self._scale_(piece)
            for piece in holding.layout.pieces
        ]

    def _scale_(self, piece: Piece) -> Scaled:
        """Update the second moments of the piece's blocks."""
        holding, finite = self._holding, self._finite
        if piece.others:
            rows, columns, finite = factored.scales_(
                holding, piece, self._c, finite, self._by_block
            )
            return Scaled(rows, finite, columns)
        moments = holding.exp_avg_sq[piece.first_block : piece.first_block + piece.num_blocks]
        mean_sq = holding.sums[piece.first_sum : piece.first_sum + piece.num_sums]
        mean_sq = mean_sq / piece.part.blocks.block_numel
        if self._by_block:
            finite = mean_sq.isfinite()
        after, scale = holding.rule.block_scale(moments, mean_sq, self._c)
        moments.copy_(after if finite is None else torch.where(finite, after, moments))
        return Scaled(scale, finite)

    def seek_peaks(self) -> None:
        """Find the largest magnitudes, here and after this step, in groups that tiles share."""
        holding, grouping = self._holding, self._holding.grouping
        if grouping is None or not grouping.shared:
            return
        opened = [Opened(holding, piece) for piece in holding.layout.pieces]
        for index, group in enumerate(grouping.shared):
            for tile in group.parts:
                moved = self._moved(group.piece, opened[group.piece], tile)
                for peak, values in zip(holding.peaks, moved.lines, strict=True):
                    # infinite, since a maximum over ranks may pass over NaN
                    largest = values.abs().nan_to_num_(torch.inf, torch.inf).max()
                    peak[index] = torch.maximum(peak[index], largest.to(peak.dtype))

    def write(self) -> None:
        """Move the weights and the lines."""
        holding = self._holding
        for number, (piece, tiles) in enumerate(holding.tiled):
            opened = Opened(holding, piece)
            draws = Draws(holding, piece, self._step)
            for tile in tiles:
                moved = self._moved(number, opened, tile)
                self._store(opened, tile, moved, draws)
            opened.put_back(holding, piece)

    def _moved(self, number: int, opened: Opened, tile: Tile) -> _Moved:
        holding, c = self._holding, self._c
        rule, dtype = holding.rule, holding.compute_dtype
        piece, scaled = holding.layout.pieces[number], self.scaled[number]
        shape = (tile.num_blocks, -1)
        g = opened.gradient[tile.span].to(dtype).view(shape)
        if self._factor is not None:
            g = g * self._factor
        moments = None
        if scaled is None:
            finite, squared = self._finite, g.square()
            if self._by_block:
                finite = squared.isfinite()
            before = self._moments(tile).view(shape)
            moments, scale = rule.block_scale(before, squared, c)
            if finite is not None:
                moments = torch.where(finite, moments, before)
        else:
            first = tile.first_block - piece.first_block
            here = slice(first, first + tile.num_blocks)
            scale, finite = scaled.scale[here].view(-1, 1), scaled.finite
            if finite is not None and finite.dim():
                finite = finite[here].view(-1, 1)
            if scaled.columns is not None:
                scale = scale * factored.by_column(piece, tile, scaled.columns)

        y = holding.weight_storage.load(opened.weight, tile.span, dtype).view(shape)
        decays = holding.group["decay"] == "all" or len(piece.part.shape) >= 2
        lines = tuple(line.view(shape) for line in load_lines(holding, opened.before, tile))
        weight, moved = rule.move(y, g, scale, lines, decays, c)
        if finite is not None:
            weight = torch.where(finite, weight, y)
            moved = tuple(
                torch.where(finite, after, before)
                for after, before in zip(moved, lines, strict=True)
            )
        return _Moved(weight, moved, moments, finite)

    def _store(self, opened: Opened, tile: Tile, moved: _Moved, draws: Draws) -> None:
        holding = self._holding
        if moved.moments is not None:
            self._moments(tile).copy_(moved.moments.view(-1))
        weight = moved.weight.view(-1)
        holding.weight_storage.store(opened.weight, tile.span, weight, draws.of(WEIGHT, tile))
        finite, groups = moved.finite, tile.groups
        for index, (line, tensors, values) in enumerate(
            zip(holding.lines, opened.lines, moved.lines, strict=True)
        ):
            if line.storage.group and finite is not None:
                groups = groups._replace(moves=finite.expand_as(values) if finite.dim() else finite)
            if line.storage.group and max(tile.shared) >= 0:
                groups = groups._replace(peaks=holding.peaks[index][list(tile.shared)])
            draw = draws.of(holding.rule.lines[index], tile)
            line.storage.store(tensors, tile.span, values.view(-1), draw, groups)

    def _moments(self, tile: Tile) -> Tensor:
        return self._holding.exp_avg_sq[tile.first_block : tile.first_block + tile.num_blocks]


class Opened:
    """A piece's memory, flat in line order."""

    def __init__(self, holding: Holding, piece: Piece) -> None:
        """Views where the memory is in line order, copies elsewhere; see `put_back`."""
        self.memory = holding.weight
        self.weight = flat_tensors(self.memory, piece)
        self.gradient = flat_line(holding.gradient, piece)
        self.lines = flat_lines(holding, piece)
        self.before = self.lines
        if holding.grouping is not None and holding.grouping.shared:
            # a tile that is stored changes the scale that the next one is still to be read with
            self.before = tuple(
                (*tensors[: len(line.by_number)], *(scales.clone() for scales in line.by_group))
                for line, tensors in zip(holding.lines, self.lines, strict=True)
            )

    def put_back(self, holding: Holding, piece: Piece) -> None:
        """Write what was stored in copies to where the memory is."""
        put_all_back(self.memory, piece, self.weight)
        put_lines_back(holding, piece, self.lines)
