"""A piece's memory as the flat line that its runs count in, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from amsf_dist.kernels.holding import Holding
from amsf_dist.kernels.tiles import Tile
from amsf_dist.shards import Piece

__all__ = [
    "flat_line",
    "flat_lines",
    "flat_tensors",
    "load_lines",
    "put_all_back",
    "put_back",
    "put_lines_back",
]


def flat_line(memory: Tensor, piece: Piece) -> Tensor:
    """Memory as the flat line the runs count in, contiguous: compiled kernels take its address.

    A copy where the numbers lie in another order, apart from one another, or are one number seen
    many times (the gradient of a sum).
    """
    views = _views(memory, piece)
    line = views[0].reshape(-1) if len(views) == 1 else torch.cat([v.reshape(-1) for v in views])
    return line.contiguous()


def flat_tensors(memory: Sequence[Tensor], piece: Piece) -> tuple[Tensor, ...]:
    """The tensors of one storage, flat in line order."""
    return tuple(flat_line(tensor, piece) for tensor in memory)


def flat_lines(holding: Holding, piece: Piece) -> tuple[tuple[Tensor, ...], ...]:
    """Memory of the rule's lines, flat in line order; scales of groups as they are."""
    return tuple((*flat_tensors(line.by_number, piece), *line.by_group) for line in holding.lines)


def load_lines(
    holding: Holding, lines: Sequence[tuple[Tensor, ...]], tile: Tile
) -> tuple[Tensor, ...]:
    """A tile of every line, [tile numel] in the compute dtype.

    Args:
        holding: of the lines.
        lines: from `flat_lines`.
        tile: of the same piece.
    """
    return tuple(
        line.storage.load(tensors, tile.span, holding.compute_dtype, tile.groups)
        for line, tensors in zip(holding.lines, lines, strict=True)
    )


def put_lines_back(holding: Holding, piece: Piece, lines: Sequence[Sequence[Tensor]]) -> None:
    """The same for the rule's lines; scales were written where they are."""
    for line, tensors in zip(holding.lines, lines, strict=True):
        put_all_back(line.by_number, piece, tensors[: len(line.by_number)])


def put_all_back(memory: Sequence[Tensor], piece: Piece, lines: Sequence[Tensor]) -> None:
    """The same for tensors of one storage."""
    for tensor, line in zip(memory, lines, strict=True):
        put_back(tensor, piece, line)


def put_back(memory: Tensor, piece: Piece, line: Tensor) -> None:
    """Write a line back when `flat_line` had to copy."""
    start = 0
    for view in _views(memory, piece):
        part = line[start : start + view.numel()]
        if part.data_ptr() != view.data_ptr():
            view.copy_(part.view(view.shape))
        start += view.numel()


def _views(memory: Tensor, piece: Piece) -> list[Tensor]:
    """The memory with its dims in line order: as a whole, or box by box."""
    order = piece.part.blocks.order
    if not piece.boxes:
        # a flat tensor holds intervals of lines, or boxes
        return [memory if order is None or memory.dim() == 1 else memory.permute(order)]
    assert order is not None
    boxes = [(memory[b.offset :][: math.prod(b.shape)].view(b.shape)) for b in piece.boxes]
    return [box.permute(order) for box in boxes]
