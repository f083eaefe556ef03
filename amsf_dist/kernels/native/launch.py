"""One call for many tensors: their rows side by side, with addresses and scalars of this step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.lines import flat_line
from amsf_dist.kernels.move import Move, Opened
from amsf_dist.kernels.native.build import library
from amsf_dist.kernels.native.table import FORMATS, PIECE, RULES, Rows, rows_of
from amsf_dist.rules.protocol import Coefficients, Scalar
from amsf_dist.shards import Piece
from amsf_dist.shards.layout import itself

__all__ = ["NativeMove", "measure", "write"]


class _Known(NamedTuple):
    """Kept with a holding from step to step.

    Attributes:
        rows: of its pieces, `PIECE` without the addresses.
        num_pieces: how many they are.
        tiles: what they point to.
        key: hyper-parameters that they were made from.
        flat: whether the pieces count in the memory as it is, if that is contiguous.
        whole: whether the tensor is seen as this rank's memory.
        agrees: whether blocks are scaled by `Move`: there is more than one way to cut it, or shares
            of groups are sought before it is stored.
        shared: whether groups are shared by tiles.
    """

    rows: bytes
    num_pieces: int
    tiles: list[Rows]
    key: tuple[Any, ...]
    flat: bool
    whole: bool
    agrees: bool
    shared: bool


class NativeMove(NamedTuple):
    """One tensor's step; second moments advance when it is written, if not when it is made.

    Attributes:
        holding: of a kind that `serves` accepts, with a finite gradient and agreed block sums.
        c: the rule's scalars, floats.
        step: its count of steps, a key of stochastic rounding.
        scaled: where blocks are scaled beforehand.
    """

    holding: Holding
    c: Coefficients
    step: Scalar
    scaled: Move | None

    @classmethod
    def of(cls, holding: Holding, c: Coefficients, step: Scalar) -> NativeMove:
        """Make it."""
        agrees = _known(holding).agrees
        return cls(holding, c, step, Move(holding, c, step, None, False) if agrees else None)

    def seek_peaks(self) -> None:
        """See `Move.seek_peaks`."""
        if self.scaled is not None:
            self.scaled.seek_peaks()


def measure(holdings: Sequence[Holding]) -> None:
    """Add grad**2 of every block to its partition's sums; see `reference.sum_of_squares`."""
    known = [_known(holding) for holding in holdings]
    table = _side_by_side(known)
    gradients: list[int] = []
    formats: list[int] = []
    alive: list[Tensor] = []
    for holding, one in zip(holdings, known, strict=True):
        memory = _gradient(holding, one)
        if one.flat and memory.is_contiguous():
            alive.append(memory)
            gradients += [memory.data_ptr()] * one.num_pieces
        else:
            lines = [flat_line(memory, piece) for piece in holding.layout.pieces]
            alive += lines
            gradients += [line.data_ptr() for line in lines]
        formats += [FORMATS[memory.dtype]] * one.num_pieces
        if len(holding.partitions) > 1:
            at = len(gradients) - one.num_pieces
            for row, piece in zip(table[at : len(gradients)], holding.layout.pieces, strict=True):
                _measure_columns(row, holding, piece)
    table["gradient"], table["gradient_format"] = gradients, formats
    table["sums"] += _addresses([holding.sums for holding in holdings], known)
    _call("amsf_measure", table)


def write(moves: Sequence[NativeMove]) -> None:
    """Move the weights and the lines, and moments that have not moved yet."""
    known = [_known(move.holding) for move in moves]
    table = _side_by_side(known)
    records: list[tuple[int, ...]] = []
    alive: list[Tensor | Opened] = []
    copies: list[tuple[Opened, Holding, Piece]] = []
    for move, one in zip(moves, known, strict=True):
        holding = move.holding
        gradient, param = _gradient(holding, one), holding.param
        weight = param if one.whole else holding.memory(param)
        if one.flat and gradient.is_contiguous() and weight.is_contiguous():
            line = holding.lines[0].tensors
            alive.append(gradient)
            record = (
                gradient.data_ptr(),
                weight.data_ptr(),
                holding.errors[0].data_ptr() if holding.errors else 0,
                line[0].data_ptr(),
                line[1].data_ptr() if len(line) > 1 else 0,
                FORMATS[gradient.dtype],
            )
            records += [record] * one.num_pieces
        else:
            for piece in holding.layout.pieces:
                opened = Opened(holding, piece)
                alive.append(opened)
                copies.append((opened, holding, piece))
                records.append(_opened(opened))
        if one.agrees:
            at = len(records) - one.num_pieces
            _share(table[at : len(records)], move, one, alive)
    names = "gradient", "weight", "error", "line", "scales", "gradient_format"
    for name, column in zip(names, np.array(records, np.uint64).T, strict=True):
        table[name] = column
    before = table["scales_before"]  # set where it is a copy
    table["scales_before"] = np.where(before == 0, table["scales"], before)
    table["moments"] += _addresses([move.holding.exp_avg_sq for move in moves], known)
    table["sums"] += _addresses([move.holding.sums for move in moves], known)
    _set_scalars(table, moves, known)
    own = np.where(table["scaled"] == 0, table["num_blocks"] * (table["elementwise"] == 0), 0)
    scratch = np.empty(int(own.sum()), np.float32)
    starts = (scratch.ctypes.data + 4 * (np.cumsum(own) - own)).astype(np.uint64)
    table["scale"] = np.where(table["scaled"] == 0, starts, table["scale"])
    _call("amsf_move", table)
    for opened, holding, piece in copies:
        opened.put_back(holding, piece)


def _side_by_side(known: Sequence[_Known]) -> Rows:
    """The rows of several tensors; numpy's own way takes microseconds for each."""
    return np.frombuffer(bytearray(b"".join([one.rows for one in known])), PIECE)


def _known(holding: Holding) -> _Known:
    key = holding.group["seed"], holding.group["decay"]
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
        agrees = shared or len(holding.partitions) > 1
        whole = holding.layout.local is itself
        known = _Known(rows.tobytes(), len(rows), tiles, key, flat, whole, agrees, shared)
        holding.prepared = known
    return known


def _gradient(holding: Holding, known: _Known) -> Tensor:
    gradient = holding.param.grad
    assert gradient is not None
    return gradient if known.whole else holding.memory(gradient)


def _addresses(tensors: Sequence[Tensor], known: Sequence[_Known]) -> np.ndarray[Any, Any]:
    """[pieces] where each piece's tensor begins."""
    addresses = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)
    return np.repeat(addresses, [one.num_pieces for one in known])


def _opened(opened: Opened) -> tuple[int, ...]:
    (line,) = opened.lines
    return (
        opened.gradient.data_ptr(),
        opened.weight[0].data_ptr(),
        opened.weight[1].data_ptr() if len(opened.weight) > 1 else 0,
        line[0].data_ptr(),
        line[1].data_ptr() if len(line) > 1 else 0,
        FORMATS[opened.gradient.dtype],
    )


def _measure_columns(row: np.void, holding: Holding, piece: Piece) -> None:
    if piece.others:
        columns, whole = piece.others
        for name, number, cut in (("column_sums", 1, columns), ("whole_sum", 2, whole)):
            row[name] = holding.partitions[number].sums.data_ptr() + 4 * cut.first_sum


def _share(rows: Rows, move: NativeMove, known: _Known, alive: list[Any]) -> None:
    """What `Move` worked out beforehand."""
    holding = move.holding
    assert move.scaled is not None
    for row, scaled in zip(rows, move.scaled.scaled, strict=True):
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


def _set_scalars(table: Rows, moves: Sequence[NativeMove], known: Sequence[_Known]) -> None:
    names = RULES[type(moves[0].holding.rule)][1]
    numbers = []
    for move in moves:
        c, factor = move.c, move.holding.factor
        own = [getattr(c, name) for name in RULES[type(move.holding.rule)][1]]
        numbers.append(
            (
                *own,
                c.carry2,
                c.fresh2,
                1.0 / c.bias_correction2,
                c.eps,
                c.clip_blocks,
                1.0 if factor is None else float(factor),
                factor is not None,
            )
        )
    counts = [one.num_pieces for one in known]
    columns = np.repeat(np.array(numbers, np.float64), counts, axis=0).T
    table["coefficients"] = columns[: len(names)].T
    rest = "carry2 fresh2 inverse_correction2 eps clips_blocks factor scales_gradient"
    for name, column in zip(rest.split(), columns[len(names) :], strict=True):
        table[name] = column
    table["step"] = np.repeat(np.array([int(move.step) for move in moves], np.int64), counts)


def _call(name: str, table: Rows) -> None:
    compiled = library()
    assert compiled is not None
    getattr(compiled, name)(table.ctypes.data, len(table), torch.get_num_threads())
