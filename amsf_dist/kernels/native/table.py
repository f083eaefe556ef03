"""A tensor as the compiled kernel wants it: a row per piece and one per tile, worked out once.

The layouts are those of the structs in tensors.h; the library is asked for their sizes when loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from amsf_dist.kernels import factored
from amsf_dist.kernels.draws import stream_of_piece
from amsf_dist.kernels.holding import WEIGHT, Holding
from amsf_dist.kernels.tiles import Tile
from amsf_dist.rules.ema import Ema
from amsf_dist.rules.schedule_free import ScheduleFree
from amsf_dist.shards import Piece
from amsf_dist.shards.runs import contiguous_runs
from amsf_dist.storage import Int8, Plain
from amsf_dist.storage.grouped import GROUP
from amsf_dist.storage.kahan import Kahan
from amsf_dist.storage.noise import family_of
from amsf_dist.storage.split import Split
from amsf_dist.storage.stochastic import Stochastic

__all__ = ["FORMATS", "PIECE", "RULES", "TILE", "Rows", "once", "rows_of", "serves"]

Rows = NDArray[np.void]

TILE = np.dtype(
    [
        (name, np.int64)
        for name in "start stop first_block num_blocks place first_group column".split()
    ]
    + [(name, np.int32) for name in "phase first_shared last_shared unused".split()]
)
_POINTERS = (
    "weight error gradient line scales scales_before peaks moments sums column_sums whole_sum "
    "column_moments whole_moment scale column_scale"
)
PIECE = np.dtype(
    [(name, np.int64) for name in "tiles num_tiles num_blocks num_columns".split()]
    + [(name, np.uint64) for name in _POINTERS.split()]
    + [("weight_family", np.uint64), ("line_family", np.uint64), ("step", np.int64)]
    + [("coefficients", np.float32, 5)]
    + [(name, np.float32) for name in "carry2 fresh2 inverse_correction2 eps".split()]
    + [(name, np.float32) for name in "block_numel column_numel whole_numel factor".split()]
    + [
        (name, np.int32)
        for name in (
            "gradient_format weight_format weight_kind error_bits line_kind rule decays "
            "clips_blocks elementwise scaled scales_gradient"
        ).split()
    ],
    align=True,
)
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES: dict[type, tuple[int, tuple[str, ...]]] = {
    ScheduleFree: (0, ("lr", "average", "direct", "keep", "decay")),
    Ema: (1, ("lr", "keep", "forget1", "fresh1", "lr")),
}
"""Number of the rule, and which of its scalars are the kernel's five."""

_WEIGHTS: dict[type, int] = {Plain: 0, Split: 1, Kahan: 2, Stochastic: 3}


def serves(holding: Holding) -> bool:
    """Whether the compiled kernel knows this tensor's rule, storages and dtypes.

    It knows those of this package. A rule or a storage of someone's own is a torch text.
    """
    storages = [line.storage for line in holding.lines]
    return (
        type(holding.rule) in RULES
        and holding.param.dtype in FORMATS
        and holding.exp_avg_sq.device.type == "cpu"
        and holding.exp_avg_sq.dtype == torch.float32
        and type(holding.weight_storage) in _WEIGHTS
        and len(storages) == 1
        and _line_kind(storages[0]) is not None
        and "seed" in holding.group
    )


def once(holding: Holding, tiles: Sequence[Rows]) -> list[int]:
    """Pieces that can be measured and moved tile by tile: every block and group lies in one.

    Args:
        holding: one that `serves` accepts.
        tiles: of its pieces, as `rows_of` gives them.
    """
    grouped = isinstance(holding.lines[0].storage, Int8)
    found = []
    for number, (piece, own) in enumerate(zip(holding.layout.pieces, tiles, strict=True)):
        numel = piece.part.blocks.block_numel
        if piece.part.elementwise or piece.others:
            continue
        cut = own["phase"].any() or (own["first_shared"] >= 0).any()
        cut = cut or (own["last_shared"] >= 0).any()
        if grouped and (numel % GROUP or cut):
            continue
        if (own["stop"] - own["start"] == own["num_blocks"] * numel).all():
            found.append(number)
    return found


def rows_of(holding: Holding) -> tuple[Rows, list[Rows]]:
    """What does not change from step to step.

    Returns:
        [pieces] of `PIECE`, with distances in bytes where the addresses of moments and sums will
        be; the tiles that its rows point to, to be kept alive.
    """
    storage, line = holding.weight_storage, holding.lines[0]
    kept = [_tiles(holding, piece, walked) for piece, walked in holding.tiled]
    rows = np.zeros(len(kept), PIECE)
    for row, tiles, piece in zip(rows, kept, holding.layout.pieces, strict=True):
        row["tiles"], row["num_tiles"] = tiles.ctypes.data, len(tiles)
        row["num_blocks"] = piece.num_blocks
        row["moments"], row["sums"] = 4 * piece.first_block, 4 * piece.first_sum
        row["block_numel"] = piece.part.blocks.block_numel
        if piece.others:
            columns, whole = piece.others
            row["num_columns"] = columns.num_blocks
            row["column_sums"], row["whole_sum"] = 4 * columns.first_sum, 4 * whole.first_sum
            row["column_moments"] = 4 * columns.first_block
            row["whole_moment"] = 4 * whole.first_block
            row["column_numel"] = columns.part.blocks.block_numel
            row["whole_numel"] = whole.part.blocks.block_numel
        row["elementwise"] = piece.part.elementwise
        row["decays"] = holding.group["decay"] == "all" or len(piece.part.shape) >= 2
        row["rule"] = RULES[type(holding.rule)][0]
        row["weight_kind"] = _WEIGHTS[type(storage)]
        row["weight_format"] = FORMATS[holding.param.dtype]
        row["error_bits"] = storage.bits if isinstance(storage, Split) else 0
        row["line_kind"] = _line_kind(line.storage) or 0
        seed, name = holding.group["seed"], piece.part.name
        for role, field in ((WEIGHT, "weight_family"), (holding.rule.lines[0], "line_family")):
            row[field] = family_of(seed, stream_of_piece(name, role)) % 2**64
    return rows, kept


def _line_kind(storage: object) -> int | None:
    if isinstance(storage, Int8):
        return 2
    if type(storage) is Stochastic and storage.dtype == torch.bfloat16:
        return 1
    return 0 if type(storage) is Plain and storage.dtype == torch.float32 else None


def _tiles(holding: Holding, piece: Piece, walked: Iterable[Tile]) -> Rows:
    """[tiles] of `TILE`; where random numbers are drawn, all contiguous in the parameter's line."""
    storages = type(holding.weight_storage), type(holding.lines[0].storage)
    draws = Stochastic in storages or Int8 in storages
    found = []
    for tile in walked:
        for part in _in_line(piece, tile) if draws else [tile]:
            column = 0
            if piece.others:
                column = factored.column_of(piece, part) - piece.others[0].first_block
            found.append(
                (
                    part.start,
                    part.stop,
                    part.first_block - piece.first_block,
                    part.num_blocks,
                    piece.place(part.start) if draws else 0,
                    part.first_group,
                    column,
                    part.phase,
                    *part.shared,
                    0,
                )
            )
    return np.array(found, TILE)


def _in_line(piece: Piece, tile: Tile) -> Iterator[Tile]:
    """A tile of a box, cut where its numbers are not neighbours in the parameter's line."""
    first, last = piece.place(tile.start), piece.place(tile.stop - 1)
    if last - first == tile.stop - 1 - tile.start:
        yield tile
        return
    span = piece.span_of(tile.start)
    length = next(contiguous_runs(span.shape, span.offsets, span.lengths, GROUP)).numel
    last_group = tile.first_group + (tile.phase + tile.stop - tile.start - 1) // GROUP
    start = tile.start
    while start < tile.stop:
        stop = min(tile.stop, start + length - (start - span.position) % length)
        for part in tile.section.clip(start, stop):
            group, phase = divmod(tile.phase + part.start - tile.start, GROUP)
            group += tile.first_group
            end = group + (phase + part.stop - part.start - 1) // GROUP
            shared = (
                tile.shared[0] if group == tile.first_group else -1,
                tile.shared[1] if end == last_group else -1,
            )
            yield Tile.of(part, group, phase)._replace(shared=shared)
        start = stop
