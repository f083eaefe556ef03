"""Which program works on which numbers: worked out on the host, once, kept on the device.

A table is int64, a row per item. Addresses of state are in it: state stays where it is as long as a
plan lives. Those of weights and gradients are not: they are looked up in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amsf_dist.kernels.holding import WEIGHT, Holding
from amsf_dist.kernels.triton.columns import Columns, ColumnTables
from amsf_dist.kernels.triton.fits import ALIGNED, FP32, Stretch
from amsf_dist.shards import Piece
from amsf_dist.storage.grouped import GROUP
from amsf_dist.storage.noise import family_of, stream_of

__all__ = ["Programs", "Tables", "build"]

_WORD = 8  # numbers that share a random word


@dataclass(frozen=True)
class Programs:
    """How large the programs are; powers of two.

    Attributes:
        groups: of 64 numbers, that a program of `move` moves.
        tiles: programs of `move` for one row of its table.
        columns: numbers that a program of `measure` reads at once.
        longest: part of a block that one program of `measure` sums.
        item: numbers for one row of the table of `measure`, if a block is not longer.
        blocks: per program of `advance_moments` and `advance_matrices`.
        warps: of `measure` and `move`.
    """

    groups: int = 32
    tiles: int = 16
    columns: int = 2048
    longest: int = 32768
    item: int = 16384
    blocks: int = 128
    warps: int = 4


_MeasureClass = tuple[int, int, bool]
_MoveClass = tuple[bool, bool, bool, bool]


@dataclass
class Tables:
    """Of some tensors.

    Attributes:
        pieces: [pieces, PIECE_FIELDS].
        num_scales: blocks in all of them and in all ways to cut them, element blocks not counted.
        measures: (rows, columns, aligned) -> items of `measure`.
        adds: items of `add_parts`; None: every sum is formed by one program.
        parts: fp32, what those add.
        moments: items of `advance_moments`; None: every element is a block.
        columns: of factored matrices.
        moves: (every element is a block, factored, blocks of whole groups, aligned) -> items of
            `move`.
        fused: aligned -> items of `measure_and_move`; what they step is in no other table.
    """

    pieces: Tensor
    num_scales: int
    measures: dict[_MeasureClass, Tensor]
    adds: Tensor | None
    parts: Tensor
    moments: Tensor | None
    columns: ColumnTables
    moves: dict[_MoveClass, Tensor]
    fused: dict[bool, Tensor]


@dataclass
class _Rows:
    """The same, as lists."""

    pieces: list[list[int]] = field(default_factory=list)
    num_scales: int = 0
    measures: dict[_MeasureClass, list[list[int]]] = field(default_factory=dict)
    moments: list[list[int]] = field(default_factory=list)
    columns: Columns = field(default_factory=Columns)
    moves: dict[_MoveClass, list[list[int]]] = field(default_factory=dict)
    fused: dict[bool, list[list[int]]] = field(default_factory=dict)
    # address of a sum -> items that form it: such as have one row, which may be a part of a block
    shares: dict[int, list[list[int]]] = field(default_factory=dict)


def build(
    holdings: Sequence[Holding],
    found: Sequence[Sequence[Sequence[Stretch]]],
    aligned: Sequence[bool],
    programs: Programs,
    fuses: bool,
) -> Tables:
    """Tables for some tensors that step in the same launches.

    Args:
        holdings: not empty.
        found: `fits.stretches` of each.
        aligned: whether the addresses of its weights and of its gradient are multiples of 16.
        programs: that will read them.
        fuses: whether blocks that decide for themselves are measured where they are moved.
    """
    rows = _Rows()
    for holding, pieces, given in zip(holdings, found, aligned, strict=True):
        state = [*holding.errors, *holding.lines[0].by_number, holding.exp_avg_sq]
        fine = given and all(tensor.data_ptr() % ALIGNED == 0 for tensor in state)
        for piece, here in zip(holding.layout.pieces, pieces, strict=True):
            if fuses and _fits(holding, piece, here, programs):
                _add_fused(rows, holding, piece, here, fine, programs)
            else:
                _add(rows, holding, piece, here, fine, programs)
    device = holdings[0].exp_avg_sq.device
    parts, adds = _add_parts(rows, device)
    return Tables(
        pieces=_table(rows.pieces, device),
        num_scales=rows.num_scales,
        measures={key: _table(items, device) for key, items in rows.measures.items()},
        adds=_table(adds, device) if adds else None,
        parts=parts,
        moments=_table(rows.moments, device) if rows.moments else None,
        columns=rows.columns.tables(device),
        moves={key: _table(items, device) for key, items in rows.moves.items()},
        fused={key: _table(items, device) for key, items in rows.fused.items()},
    )


def _add(
    rows: _Rows,
    holding: Holding,
    piece: Piece,
    here: Sequence[Stretch],
    fine: bool,
    programs: Programs,
) -> None:
    """Add a piece to the tables; `fine`: all of its addresses are aligned."""
    number, element = len(rows.pieces), piece.part.elementwise
    rows.pieces.append(_piece_row(holding, piece))
    sums = holding.sums.data_ptr() + FP32 * piece.first_sum
    for start, numel, count, first in _measured(piece, programs):
        row = 1 << max(0, numel - 1).bit_length()
        together = max(1, programs.columns // row) if count > 1 else 1
        ok = fine and start % ALIGNED == 0 and numel % ALIGNED == 0
        item = [number, start, numel, count, sums + FP32 * first]
        key = (together, programs.columns // together, ok)
        rows.measures.setdefault(key, []).append(item)
        if count == 1:
            rows.shares.setdefault(item[-1], []).append(item)
    size = programs.groups * GROUP * programs.tiles
    for stretch in here:
        for move in _moved(number, piece, stretch, rows.num_scales, size):
            ok = fine and move[1] % ALIGNED == 0 and move[2] % ALIGNED == 0
            ok = ok and move[3] % _WORD == 0 and (not element or move[4] % ALIGNED == 0)
            whole = not element and move[5] % GROUP == 0 and move[6] % GROUP == 0
            rows.moves.setdefault((element, bool(piece.others), whole, ok), []).append(move)
    if piece.others:
        rows.columns.add(holding, piece, number, max(1, programs.item // GROUP), fine)
        first = rows.num_scales
        rows.moments.append(rows.columns.advance(holding, piece, number, first, programs.blocks))
        rows.pieces[number][-1] = first + piece.num_blocks
        rows.num_scales += piece.num_blocks + piece.others[0].num_blocks + 1
    elif not element:
        moments = holding.exp_avg_sq.data_ptr() + FP32 * piece.first_block
        for at in range(0, piece.num_blocks, programs.blocks):
            count, skipped = min(programs.blocks, piece.num_blocks - at), FP32 * at
            addresses = [moments + skipped, sums + skipped]
            numel = piece.part.blocks.block_numel
            rows.moments.append([number, *addresses, rows.num_scales + at, count, numel])
        rows.num_scales += piece.num_blocks


def _fits(holding: Holding, piece: Piece, here: Sequence[Stretch], programs: Programs) -> bool:
    """Whether programs can take whole blocks of a piece, and have enough to do with each."""
    numel = piece.part.blocks.block_numel
    return (
        not piece.part.elementwise
        and programs.columns // 4 <= numel <= programs.longest
        and (not holding.lines[0].storage.group or numel % GROUP == 0)
        and all(run.whole and run.block_numel == numel for run in piece.runs)
        and all(part[:2] == (part.run.offset, part.run.numel) for part in here)
    )


def _add_fused(
    rows: _Rows,
    holding: Holding,
    piece: Piece,
    here: Sequence[Stretch],
    fine: bool,
    programs: Programs,
) -> None:
    number, block_numel = len(rows.pieces), piece.part.blocks.block_numel
    rows.pieces.append(_piece_row(holding, piece))
    sums = holding.sums.data_ptr() + FP32 * piece.first_sum
    for stretch in here:
        for item in _moved(number, piece, stretch, 0, block_numel * programs.tiles):
            item[6] = sums + FP32 * item[4]
            item[4] += piece.first_block
            ok = fine and item[1] % ALIGNED == 0 and block_numel % ALIGNED == 0
            ok = ok and item[3] % _WORD == 0
            rows.fused.setdefault(ok, []).append(item)


def _piece_row(holding: Holding, piece: Piece) -> list[int]:
    """PIECE_FIELDS numbers."""
    line, name = holding.lines[0].tensors, piece.part.name
    seed: int = holding.group["seed"]
    return [
        holding.errors[0].data_ptr() if holding.errors else 0,
        line[0].data_ptr(),
        line[1].data_ptr() if len(line) > 1 else 0,
        holding.exp_avg_sq.data_ptr(),
        holding.index,
        int(len(piece.part.shape) >= 2),
        family_of(seed, stream_of(name, WEIGHT)),
        family_of(seed, stream_of(name, holding.rule.lines[0])),
        0,
    ]


def _measured(piece: Piece, programs: Programs) -> Iterator[tuple[int, int, int, int]]:
    """(first number, numbers per row, rows, first sum): what one program each measures."""
    for run in piece.runs:
        if piece.part.elementwise:  # one sum for all, only to see that all are finite
            sections = [(run.offset, run.numel, 1, 0)]
        else:
            sections = [
                (
                    section.start,
                    (section.stop - section.start) // section.num_blocks,
                    section.num_blocks,
                    section.first_block - piece.first_block,
                )
                for section in run.sections()
            ]
        for start, numel, count, first in sections:
            if numel > programs.longest:
                for row in range(count):
                    for begin in range(0, numel, programs.item):
                        size = min(programs.item, numel - begin)
                        yield start + row * numel + begin, size, 1, first + row
            else:
                together = max(1, programs.item // numel)
                for row in range(0, count, together):
                    yield start + row * numel, numel, min(together, count - row), first + row


def _moved(
    number: int, piece: Piece, stretch: Stretch, scales: int, numel: int
) -> Iterator[list[int]]:
    """MOVE_FIELDS numbers per item of `numel`; `scales`: where those of the piece begin."""
    run = stretch.run
    for begin in range(0, stretch.numel, numel):
        start = stretch.start + begin
        before = run.phase + start - run.offset
        block = run.first_block + before // run.block_numel
        yield [
            number,
            start,
            min(numel, stretch.numel - begin),
            stretch.place + begin,
            block if piece.part.elementwise else block - piece.first_block + scales,
            run.block_numel,
            before % run.block_numel,
            stretch.group + begin // GROUP,
        ]


def _add_parts(rows: _Rows, device: torch.device) -> tuple[Tensor, list[list[int]]]:
    """Scratch for sums that several programs form, and what adds it up."""
    shared = {address: items for address, items in rows.shares.items() if len(items) > 1}
    parts = torch.zeros(sum(map(len, shared.values())), device=device)
    adds, at = [], parts.data_ptr()
    for address, items in shared.items():
        adds.append([at, len(items), address])
        for item in items:
            item[-1] = at
            at += FP32
    return parts, adds


def _table(rows: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(device)
