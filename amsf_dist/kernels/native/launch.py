"""One call for many tensors: their rows side by side, with addresses and scalars of this step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amsf_dist.kernels.choice import by_parameter
from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.lines import flat_line
from amsf_dist.kernels.move import Move, Opened
from amsf_dist.kernels.native.build import library
from amsf_dist.kernels.native.table import FORMATS, PIECE, RULES, Rows, once, rows_of
from amsf_dist.rules.protocol import Coefficients
from amsf_dist.shards import Piece
from amsf_dist.shards.layout import itself

__all__ = ["Table", "Written", "parted"]

_OF_MATRICES = ("column_sums", "whole_sum", "column_moments", "whole_moment")
"""Addresses that only factored pieces have."""


class _Known(NamedTuple):
    """Kept with a holding from step to step.

    Attributes:
        rows: of its pieces, `PIECE` without the addresses.
        num_pieces: how many they are.
        tiles: what they point to.
        key: hyper-parameters that they were made from.
        flat: whether the pieces count in the memory as it is, if that is contiguous.
        whole: whether the tensor is seen as this rank's memory.
        shared: whether groups are shared by tiles: then `Move` scales its blocks, and seeks what is
            shared before it is stored.
        once: pieces that can be measured and moved in one pass.
    """

    rows: bytes
    num_pieces: int
    tiles: list[Rows]
    key: tuple[Any, ...]
    flat: bool
    whole: bool
    shared: bool
    once: list[int]


class Table:
    """Tensors of a lane that step together, all of a kind that `serves` accepts.

    Addresses are looked at anew in every step: wrappers put other memory under a parameter. Rows
    stay as they are while the addresses do, and everything else is by columns, because microseconds
    for a tensor are many where tensors are small.
    """

    def __init__(self, holdings: Sequence[Holding]) -> None:
        """Put their rows side by side."""
        self.holdings = holdings
        self._known = [_known(holding) for holding in holdings]
        counts = [one.num_pieces for one in self._known]
        self._owner = np.repeat(np.arange(len(holdings)), counts)
        self._index = np.repeat([holding.index for holding in holdings], counts)
        ends = np.cumsum(counts).tolist()
        self._span = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
        self._agreeing = [i for i, one in enumerate(self._known) if one.shared]
        # of a step's rows: a column for each, tensors in the order of the holdings. Those of a lane
        # may differ in dtype, and so in storage
        self._kept = {
            "line": [holding.lines[0].tensors[0] for holding in holdings],
            "error": _first([holding.errors for holding in holdings]),
            "scales": _first([holding.lines[0].tensors[1:] for holding in holdings]),
            "moments": [holding.exp_avg_sq for holding in holdings],
            "sums": [holding.sums for holding in holdings],
        }
        for number, sums, moments in ((1, *_OF_MATRICES[::2]), (2, *_OF_MATRICES[1::2])):
            ways = [holding.partitions[number : number + 1] for holding in holdings]
            self._kept[sums] = _first([[way.sums for way in own] for own in ways])
            self._kept[moments] = _first([[way.moments for way in own] for own in ways])
        self._beside = [tensor for tensors in self._kept.values() for tensor in tensors]
        self._addresses: list[int] = []
        self._rows = np.zeros(0, PIECE)
        self._scratch = np.zeros(0, np.float32)
        self._measured: tuple[Rows, list[bool]] | None = None

    def is_current(self) -> bool:
        """Whether it was made from the hyper-parameters as they are now."""
        return not self.holdings or _key(self.holdings[0]) == self._known[0].key

    def measure(self) -> bool:
        """Add grad**2 of every block to its partition's sums; see `reference.sum_of_squares`.

        Returns:
            Whether these sums are all finite.
        """
        self._measured = table, straight = self._of_step()
        alive: list[Tensor] = []
        for i, holding in enumerate(self.holdings):
            if not straight[i]:
                lines = [flat_line(holding.gradient, piece) for piece in holding.layout.pieces]
                alive += lines
                table[self._span[i]]["gradient"] = [line.data_ptr() for line in lines]
        return bool(_call("amsf_measure", table))

    def moves(self, c: Coefficients, draws: Tensor) -> Written:
        """Advance the moments of those whose blocks are scaled beforehand.

        Args:
            c: the rule's scalars, columns over the lane.
            draws: [lane's parameters] fp64, keys of stochastic rounding.
        """
        scaled = {}
        if self._agreeing:
            rows, steps = by_parameter(c, draws)
            for i in self._agreeing:
                holding = self.holdings[i]
                at = holding.index
                scaled[i] = Move(holding, rows[at], steps[at], None, False)
        return Written(self, c, draws, scaled)

    def write(self, c: Coefficients, draws: Tensor, scaled: dict[int, Move]) -> None:
        """Move the weights and the lines, and moments that have not moved yet."""
        self._call_with_all("amsf_move", c, draws, scaled)

    def step(self, c: Coefficients, draws: Tensor) -> bool:
        """Measure and move in one pass, of what `parted` allows: blocks decide themselves.

        Returns:
            Whether all gradients were finite.
        """
        return bool(self._call_with_all("amsf_step", c, draws, {}))

    def _call_with_all(
        self, name: str, c: Coefficients, draws: Tensor, scaled: dict[int, Move]
    ) -> int:
        table, straight = self._measured or self._of_step()
        self._measured = None
        copies: list[tuple[Opened, Holding, Piece]] = []
        for i, holding in enumerate(self.holdings):
            if not straight[i]:
                for row, piece in zip(table[self._span[i]], holding.layout.pieces, strict=True):
                    copies.append((Opened(holding, piece), holding, piece))
                    _open(row, copies[-1][0])
        alive = [
            _share(table[self._span[i]], self.holdings[i], self._known[i], scaled[i])
            for i in scaled
        ]
        self._set_scalars(table, c, draws)
        result = _call(name, table)
        del alive
        for opened, holding, piece in copies:
            opened.put_back(holding, piece)
        return result

    def _of_step(self) -> tuple[Rows, list[bool]]:
        """This step's rows, and which tensors can be read and written where they are."""
        weights, gradients = [], []
        for holding, one in zip(self.holdings, self._known, strict=True):
            weight, gradient = holding.param, holding.param.grad
            assert gradient is not None
            weights.append(weight if one.whole else holding.memory(weight))
            gradients.append(gradient if one.whole else holding.memory(gradient))
        addresses = [tensor.data_ptr() for tensor in [*weights, *self._beside]]
        if addresses != self._addresses:
            self._rows, self._addresses = self._placed(weights), addresses
        table = self._rows
        straight = [
            one.flat and weight.is_contiguous() and gradient.is_contiguous()
            for one, weight, gradient in zip(self._known, weights, gradients, strict=True)
        ]
        if self._agreeing or not all(straight):
            table = table.copy()  # which they will change
        table["gradient"] = self._spread(gradients)
        formats = [FORMATS[gradient.dtype] for gradient in gradients]
        table["gradient_format"] = np.array(formats, np.int32)[self._owner]
        return table, straight

    def _placed(self, weights: Sequence[Tensor]) -> Rows:
        """Rows with all addresses but those of the gradients."""
        rows = np.frombuffer(bytearray(b"".join([one.rows for one in self._known])), PIECE)
        rows["weight"] = self._spread(weights)
        for name, tensors in self._kept.items():
            if tensors:
                rows[name] += self._spread(tensors)  # to where a piece begins
        rows["scales_before"] = rows["scales"]
        matrices = rows["num_columns"] > 0
        for name in _OF_MATRICES:
            rows[name] *= matrices
        own = rows["num_blocks"] * (rows["elementwise"] == 0) + rows["num_columns"]
        self._scratch = np.empty(int(own.sum()), np.float32)
        rows["scale"] = self._scratch.ctypes.data + 4 * (np.cumsum(own) - own)
        rows["column_scale"] = (rows["scale"] + 4 * rows["num_blocks"]) * matrices
        return rows

    def _spread(self, tensors: Sequence[Tensor]) -> NDArray[np.uint64]:
        """[pieces] where each piece's tensor begins."""
        return np.array([tensor.data_ptr() for tensor in tensors], np.uint64)[self._owner]

    def _set_scalars(self, table: Rows, c: Coefficients, draws: Tensor) -> None:
        def column(scalar: Tensor | float) -> Any:
            return scalar.numpy()[self._index] if isinstance(scalar, Tensor) else scalar

        for number, name in enumerate(RULES[type(self.holdings[0].rule)][1]):
            table["coefficients"][:, number] = column(getattr(c, name))
        table["carry2"], table["fresh2"] = column(c.carry2), column(c.fresh2)
        table["inverse_correction2"] = 1.0 / column(c.bias_correction2)
        table["eps"], table["clips_blocks"] = column(c.eps), c.clip_blocks
        table["step"] = column(draws)
        table["factor"] = 1.0
        table["scales_gradient"] = 0
        factors = self.holdings[0].factors  # of the lane: one group, which clips or does not
        if factors is not None:
            table["scales_gradient"], table["factor"] = 1, column(factors)


class Written(NamedTuple):
    """What is to be written of a table's tensors; see `Moves`.

    Attributes:
        table: of them; they have finite gradients and agreed block sums.
        c: the rule's scalars.
        draws: see `Table.moves`.
        scaled: of those whose blocks are scaled beforehand, by their place in the table.
    """

    table: Table
    c: Coefficients
    draws: Tensor
    scaled: dict[int, Move]

    def seek_peaks(self) -> None:
        """See `Move.seek_peaks`."""
        for move in self.scaled.values():
            move.seek_peaks()

    def write(self) -> None:
        """See `Table.write`."""
        self.table.write(self.c, self.draws, self.scaled)


def _first(tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The first of each, an empty one where there is none; nothing where there are none at all."""
    return [own[0] if own else torch.empty(0) for own in tensors] if any(tensors) else []


def parted(holding: Holding) -> tuple[list[Holding], list[Holding]]:
    """What of it can be measured and moved in one pass, and what cannot."""
    pieces = _known(holding).once
    others = set(range(len(holding.layout.pieces))).difference(pieces)
    return holding.only(pieces), holding.only(others)


def _key(holding: Holding) -> tuple[Any, ...]:
    return holding.group["seed"], holding.group["decay"]


def _known(holding: Holding) -> _Known:
    key = _key(holding)
    known: _Known | None = holding.prepared
    if known is None or known.key != key:
        rows, tiles = rows_of(holding)
        beside = [*holding.errors, *holding.lines[0].tensors, holding.exp_avg_sq]
        dims = holding.memory(holding.param).dim()
        flat = all(tensor.is_contiguous() for tensor in beside) and all(
            not piece.boxes and (piece.part.blocks.order is None or dims == 1)
            for piece in holding.layout.pieces
        )
        shared = holding.grouping is not None and bool(holding.grouping.shared)
        whole = holding.layout.local is itself
        pieces = once(holding, tiles) if flat else []
        known = _Known(rows.tobytes(), len(rows), tiles, key, flat, whole, shared, pieces)
        holding.prepared = known
    return known


def _open(row: np.void, opened: Opened) -> None:
    """Of a piece whose memory is a copy."""
    (line,) = opened.lines
    row["gradient"] = opened.gradient.data_ptr()
    row["weight"], row["line"] = opened.weight[0].data_ptr(), line[0].data_ptr()
    row["error"] = opened.weight[1].data_ptr() if len(opened.weight) > 1 else 0
    row["scales"] = row["scales_before"] = line[1].data_ptr() if len(line) > 1 else 0
    row["gradient_format"] = FORMATS[opened.gradient.dtype]


def _share(rows: Rows, holding: Holding, known: _Known, move: Move) -> list[Tensor]:
    """What `Move` worked out beforehand; the tensors that the rows point to."""
    alive = []
    for row, scaled in zip(rows, move.scaled, strict=True):
        if scaled is not None:
            scales = [scaled.scale.contiguous()]
            scales += [] if scaled.columns is None else [scaled.columns.contiguous()]
            alive += scales
            row["scaled"], row["scale"] = 1, scales[0].data_ptr()
            row["column_scale"] = scales[1].data_ptr() if len(scales) > 1 else 0
    if known.shared:
        # a tile that is stored changes the scale that the next one is still to be read with
        before = holding.lines[0].by_group[0].clone()
        alive.append(before)
        rows["scales_before"], rows["peaks"] = before.data_ptr(), holding.peaks[0].data_ptr()
    return alive


def _call(name: str, table: Rows) -> int:
    compiled = library()
    assert compiled is not None
    called: int = getattr(compiled, name)(table.ctypes.data, len(table), torch.get_num_threads())
    return called
